"""Probe: unsplit products, K shared by the warps of a program (batched dot)."""
import json, sys, itertools, concurrent.futures, multiprocessing
import torch, triton, triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from benchmarks.decode_step import capture, milliseconds, BANDWIDTH
from benchmarks.gpu_workloads import MODELS
from benchmarks.tune_products import Bench, shape_of
from octavo.kernels.triton import products


@triton.jit
def slab_sum(x_ptr, w_ptr, weight_rows, num_rows, K: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, WAITS: tl.constexpr):
    p = tl.arange(0, PARTS); k = tl.arange(0, BLOCK_K); m = tl.arange(0, BLOCK_M)
    KP: tl.constexpr = K // PARTS
    w_ptrs = w_ptr + weight_rows.to(tl.int64)[None, :, None] * K + p[:, None, None] * KP + k[None, None, :]
    if EARLY > 0:
        w0 = tl.load(w_ptrs)
    if EARLY > 1:
        w1 = tl.load(w_ptrs + BLOCK_K)
    if EARLY > 2:
        w2 = tl.load(w_ptrs + 2 * BLOCK_K)
    if WAITS:
        gdc_wait()
        gdc_launch_dependents()
    x_ptrs = x_ptr + m[None, None, :] * K + p[:, None, None] * KP + k[None, :, None]
    mask = m[None, None, :] < num_rows
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    if EARLY > 0:
        acc = tl.dot(w0, tl.load(x_ptrs, mask=mask, other=0.0), acc)
    if EARLY > 1:
        acc = tl.dot(w1, tl.load(x_ptrs + BLOCK_K, mask=mask, other=0.0), acc)
    if EARLY > 2:
        acc = tl.dot(w2, tl.load(x_ptrs + 2 * BLOCK_K, mask=mask, other=0.0), acc)
    if EARLY * BLOCK_K < KP:
        for start in tl.range(EARLY * BLOCK_K, KP, BLOCK_K, num_stages=STAGES):
            w = tl.load(w_ptrs + start)
            x = tl.load(x_ptrs + start, mask=mask, other=0.0)
            acc = tl.dot(w, x, acc)
    return tl.sum(acc, axis=0)


@triton.jit
def slab_residual(x_ptr, w_ptr, res_ptr, norm_ptr, scaled_ptr, sq_ptr, num_rows, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    norm = tl.load(norm_ptr + rows).to(tl.float32)
    acc = slab_sum(x_ptr, w_ptr, rows, num_rows, K, PARTS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES, EARLY, True)
    where = m[None, :] * N + rows[:, None]
    valid = m[None, :] < num_rows
    before = tl.load(res_ptr + where, mask=valid, other=0.0).to(tl.float32)
    after = (before + acc).to(res_ptr.dtype.element_ty)
    tl.store(res_ptr + where, after, mask=valid)
    wide = after.to(tl.float32)
    tl.store(scaled_ptr + where, (wide * norm[:, None]).to(scaled_ptr.dtype.element_ty), mask=valid)
    tl.store(sq_ptr + m * (N // BLOCK_N) + tl.program_id(0), tl.sum(wide * wide, axis=0), mask=m < num_rows)


@triton.jit
def slab_gate_up(x_ptr, w_ptr, sq_ptr, out_ptr, num_rows, N: tl.constexpr, K: tl.constexpr, SQ: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    # weight rows: half gate half up, then split
    n = tl.arange(0, BLOCK_N)
    column = tl.program_id(0) * (BLOCK_N // 2) + n // 2
    rows = tl.where(n % 2 == 0, column, N + column)
    acc = slab_sum(x_ptr, w_ptr, rows, num_rows, K, PARTS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES, EARLY, True)
    m = tl.arange(0, BLOCK_M)
    t = tl.arange(0, SQ)
    squares = tl.load(sq_ptr + m[:, None] * SQ + t[None, :], mask=(m < num_rows)[:, None], other=0.0)
    scale = tl.rsqrt(tl.sum(squares, axis=1) / K + 1e-6)
    acc = acc * scale[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1)))
    out = gate / (1.0 + tl.exp(-gate)) * up
    c = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    tl.store(out_ptr + m[None, :] * N + c[:, None], out.to(out_ptr.dtype.element_ty), mask=m[None, :] < num_rows)


@triton.jit
def slab_plain(x_ptr, w_ptr, sq_ptr, out_ptr, num_rows, N: tl.constexpr, K: tl.constexpr, SQ: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = slab_sum(x_ptr, w_ptr, rows, num_rows, K, PARTS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES, EARLY, True)
    m = tl.arange(0, BLOCK_M)
    t = tl.arange(0, SQ)
    squares = tl.load(sq_ptr + m[:, None] * SQ + t[None, :], mask=(m < num_rows)[:, None], other=0.0)
    scale = tl.rsqrt(tl.sum(squares, axis=1) / K + 1e-6)
    tl.store(out_ptr + m[None, :] * N + rows[:, None], (acc * scale[None, :]).to(out_ptr.dtype.element_ty), mask=m[None, :] < num_rows)


@triton.jit
def floor_kernel(x_ptr, out_ptr, K: tl.constexpr, M: tl.constexpr):
    gdc_wait()
    gdc_launch_dependents()
    k = tl.arange(0, K); m = tl.arange(0, M)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :]).to(tl.float32)
    tl.store(out_ptr + m * 4096 + tl.program_id(0), tl.sum(x, axis=1))


def launch(kind, b, w, cut):
    block_n, parts, block_k, stages, early, warps = cut
    n, k = w.shape
    M = max(16, triton.next_power_of_2(b.rows))
    opts = dict(K=k, PARTS=parts, BLOCK_N=block_n, BLOCK_M=M, BLOCK_K=block_k, STAGES=stages, EARLY=early, num_warps=warps, launch_pdl=True)
    if kind in ("o", "down"):
        slab_residual[(n // block_n,)](b.x, w, b.stream, b.norm, b.scaled, b.sq2, b.rows, N=n, **opts)
    elif kind == "gate_up":
        slab_gate_up[(n // block_n,)](b.x, w, b.squares, b.out, b.rows, N=n // 2, SQ=b.squares.shape[1], **opts)
    else:
        slab_plain[(n // block_n,)](b.x, w, b.squares, b.stream, b.rows, N=n, SQ=b.squares.shape[1], **opts)


def cuts(config, kind, rows, big):
    n, k = shape_of(config, kind)
    found = []
    for block_n, parts, block_k in itertools.product((16, 32, 64), (4, 8), (64, 128, 256)):
        kp = k // parts
        programs = n // block_n
        if kp % block_k or not 24 <= programs <= (800 if big else 400):
            continue
        M = max(16, rows)
        chunks = kp // block_k
        for early in (0, 1, 2, 3):
            if early > chunks or (early < chunks and early > 1 and not big and chunks <= 3):
                continue
            held = block_n * parts * block_k * 2 * early
            if held > 100_000 or (early and held < 16_000):
                continue
            stages = 1 if early == chunks else 4
            stage_bytes = (block_n + M) * parts * block_k * 2
            if early < chunks:
                room = (200_000 - held) // stage_bytes
                if room < 2: continue
                stages = min(6, room)
            elif stage_bytes > 220_000: continue
            if M * block_n * parts * 4 > 140_000: continue
            found.append((block_n, parts, block_k, stages, early, 8 if parts == 8 else 4))
    return found


def make(config, kind, rows, copies):
    b = Bench(config, kind, rows, copies)
    n = b.weights[0].shape[0]
    b.sq2 = torch.empty(rows, n // 16, device="cuda")
    return b


def compile_one(job):
    model, kind, rows, cs = job
    b = make(MODELS[model], kind, rows, 1)
    good = []
    for c in cs:
        try:
            launch(kind, b, b.weights[0], c); torch.cuda.synchronize(); good.append(c)
        except Exception as e:
            print("X", kind, rows, c, repr(e)[:160], flush=True)
    return (model, kind, rows), good


def main():
    model, rows_list, kinds = sys.argv[1], [int(r) for r in sys.argv[2].split(",")], sys.argv[3].split(",")
    big = model == "qwen3-8b"
    config = MODELS[model]
    jobs = []
    for kind in kinds:
        for rows in rows_list:
            cs = cuts(config, kind, rows, big)
            for i in range(3):
                if cs[i::3]: jobs.append((model, kind, rows, cs[i::3]))
    good = {}
    with concurrent.futures.ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        for key, cs in pool.map(compile_one, jobs):
            good.setdefault(key, []).extend(cs)
    print("compiled", sum(map(len, good.values())), flush=True)
    x = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16); out = torch.empty(16, 4096, device="cuda")
    for programs in (64, 128):
        g = capture(lambda: [floor_kernel[(programs,)](x, out, K=1024, M=16, num_warps=4, launch_pdl=True) for _ in range(50)])
        print("floor", programs, milliseconds(g, 15) / 50 * 1e3, flush=True)
    for kind in kinds:
        for rows in rows_list:
            n, k = shape_of(config, kind)
            copies = max(2, min(24, -(-400_000_000 // (2 * n * k))))
            b = make(config, kind, rows, copies)
            tiling = products.choose_tiling({"o": "residual", "down": "residual"}.get(kind, kind), n, k, rows)
            now = milliseconds(capture(b.all(tiling)), 15) / copies * 1e3
            lib = milliseconds(capture(lambda: [torch.mm(b.x, w.t()) for w in b.weights]), 15) / copies * 1e3
            res = []
            for c in good.get((model, kind, rows), []):
                try:
                    g = capture(lambda: [launch(kind, b, w, c) for w in b.weights])
                    res.append((milliseconds(g, 9) / copies * 1e3, c))
                except Exception as e:
                    print("Y", kind, rows, c, repr(e)[:100])
            res.sort()
            # check the best
            if res:
                c = res[0][1]
                b.stream.normal_(); before = b.stream.clone()
                launch(kind, b, b.weights[0], c)
                ref = b.x.float() @ b.weights[0].float().t()
                scale = torch.rsqrt(b.squares.sum(1, keepdim=True) / k + 1e-6)
                if kind in ("o", "down"): got, want = b.stream.float() - before.float(), ref
                elif kind == "gate_up":
                    a, u = (ref * scale).chunk(2, 1); got, want = b.out.float()[:, : n // 2], torch.nn.functional.silu(a) * u
                else: got, want = b.stream.float(), ref * scale
                err = float((got - want).norm() / want.norm())
            print(json.dumps({"kind": kind, "rows": rows, "limit": round(2 * n * k / BANDWIDTH * 1e6, 2), "now": round(now, 2), "cublas": round(lib, 2), "err": err if res else None,
                "best": [(round(t, 2), c) for t, c in res[:4]]}), flush=True)
if __name__ == "__main__":
    main()

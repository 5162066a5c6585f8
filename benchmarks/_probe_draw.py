import torch
from benchmarks.decode_step import capture, milliseconds
from octavo.kernels.triton import sample, select
V = 151_936
for kind in ("randn*3", "flat"):
  for rows in (1, 16, 64, 256):
    logits = torch.randn(rows, V, device="cuda") * (3 if kind == "randn*3" else 0.6)
    ones = torch.ones(rows, device="cuda"); seed = torch.arange(rows, device="cuda"); tok = seed % V
    k = torch.full((rows,), 50, dtype=torch.int32, device="cuda"); k0 = k * 0
    p = ones * 0.9
    t = {}
    def timed(name, f): t[name] = round(milliseconds(capture(f), 20) * 1e3, 1)
    timed("greedy", lambda: sample.draw(logits, None))
    timed("plain", lambda: sample.draw(logits, ones, seed=seed, position=seed))
    timed("k", lambda: sample.draw(logits, ones, k, ones, ones * 0, seed, seed, any_both=False))
    timed("p", lambda: sample.draw(logits, ones, k0, p, ones * 0, seed, seed, any_both=False))
    timed("kp", lambda: sample.draw(logits, ones, k, p, ones * 0, seed, seed))
    timed("minp", lambda: sample.draw(logits, ones, k0, ones, ones * 0.05, seed, seed, any_cut=False))
    timed("top20", lambda: select.top(logits, tok, 20))
    timed("logprob", lambda: select.top(logits, tok, 0))
    print(kind, rows, t, flush=True)

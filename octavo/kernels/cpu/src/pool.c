// octavo: built once
/* The thread pool.
 *
 * Claiming. `ticket` holds the number of the current loop (high 32 bits) and how many of its items
 * are not yet handed out (low 32 bits). A thread takes items by compare-and-swap, which can only
 * succeed while the loop is the current one and not exhausted; and a loop cannot end while someone
 * holds items of it. So a worker that wakes up late finds nothing to do, never stale work, and the
 * caller never waits for a worker that took nothing: a thread that the system has taken off its
 * core costs at most the chunk it holds. Chunks shrink as the loop nears its end.
 *
 * Waiting. Both a worker without work and a caller waiting for the last chunk spin for a bounded
 * time and then sleep on a condition variable. Unbounded spinning is what turns one busy foreign
 * thread into a step many times as long: the spinner holds the core that the working thread needs.
 *
 * A flag announces a sleeper, and sleeper and waker use sequentially consistent operations in
 * opposite order (flag, then state; state, then flag), so that a wake-up is not lost and the
 * common case, nobody asleep, takes no lock.
 */
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <time.h>

#define SPIN_NS 50000

static struct {
    pthread_mutex_t region; /* held while a loop runs: one loop at a time */
    pthread_mutex_t sleep;
    pthread_cond_t work, finished;
    int threads;         /* wanted, the caller included; 0: not set yet */
    int started;         /* workers that exist */
    bool fork_handler;
    pthread_t workers[OC_MAX_THREADS];
    _Atomic bool stop;
    _Atomic int sleepers;
    _Atomic bool caller_sleeps;
    /* The current loop. Written only while no items are out. */
    _Atomic(oc_task) task;
    _Atomic(void *) ctx;
    _Atomic int64_t items, grain;
    _Atomic int share; /* a chunk is 1 / share of what is left */
    _Alignas(128) _Atomic uint64_t ticket;
    _Alignas(128) _Atomic int64_t done;
    _Alignas(128) char end;
} pool = {
    .region = PTHREAD_MUTEX_INITIALIZER,
    .sleep = PTHREAD_MUTEX_INITIALIZER,
    .work = PTHREAD_COND_INITIALIZER,
    .finished = PTHREAD_COND_INITIALIZER,
};

static _Thread_local bool inside; /* this thread is running a task */

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Takes chunks until none is left. Returns the loop's number, to wait for the next one. */
static uint32_t work_off(int thread) {
    uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    for (;;) {
        const int64_t left = (int64_t)(ticket & UINT32_MAX);
        if (left == 0) return (uint32_t)(ticket >> 32);
        const oc_task task = atomic_load_explicit(&pool.task, memory_order_relaxed);
        void *ctx = atomic_load_explicit(&pool.ctx, memory_order_relaxed);
        const int64_t items = atomic_load_explicit(&pool.items, memory_order_relaxed);
        const int64_t grain = atomic_load_explicit(&pool.grain, memory_order_relaxed);
        int64_t take = left / atomic_load_explicit(&pool.share, memory_order_relaxed);
        take -= take % grain; /* whole grains, so that kernels see full tiles */
        if (take < grain) take = grain;
        if (take > left) take = left;
        if (!atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket - (uint64_t)take,
                                                   memory_order_acq_rel, memory_order_acquire))
            continue;
        inside = true;
        task(ctx, items - left, items - left + take, thread);
        inside = false;
        if (atomic_fetch_add(&pool.done, take) + take == items && thread != 0 &&
            atomic_load(&pool.caller_sleeps)) {
            pthread_mutex_lock(&pool.sleep);
            pthread_cond_signal(&pool.finished);
            pthread_mutex_unlock(&pool.sleep);
        }
        ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    }
}

static inline bool is_new(uint32_t seen) {
    return (uint32_t)(atomic_load(&pool.ticket) >> 32) != seen || atomic_load(&pool.stop);
}

static void wait_for_loop(uint32_t seen) {
    const int64_t until = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (is_new(seen)) return;
            relax();
        }
    } while (now_ns() < until);
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.sleepers, 1);
    while (!is_new(seen)) pthread_cond_wait(&pool.work, &pool.sleep);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.sleep);
}

static void *worker(void *index) {
    while (!atomic_load(&pool.stop)) wait_for_loop(work_off((int)(intptr_t)index));
    return NULL;
}

static void wait_for_end(int64_t items) {
    const int64_t until = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&pool.done, memory_order_acquire) == items) return;
            relax();
        }
    } while (now_ns() < until);
    pthread_mutex_lock(&pool.sleep);
    atomic_store(&pool.caller_sleeps, true);
    while (atomic_load(&pool.done) != items) pthread_cond_wait(&pool.finished, &pool.sleep);
    atomic_store(&pool.caller_sleeps, false);
    pthread_mutex_unlock(&pool.sleep);
}

/* The threads of the parent do not exist in a forked child, whatever they held. */
static void forget_threads(void) {
    pthread_mutex_init(&pool.region, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.finished, NULL);
    pool.started = 0;
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.caller_sleeps, false);
    atomic_store(&pool.stop, false);
    atomic_store(&pool.ticket, atomic_load(&pool.ticket) & ~(uint64_t)UINT32_MAX);
    inside = false;
}

static void start_workers(void) {
    if (!pool.fork_handler) pool.fork_handler = pthread_atfork(NULL, NULL, forget_threads) == 0;
    sigset_t all, before; /* signals belong to the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.started < pool.threads - 1) {
        const intptr_t index = pool.started + 1;
        if (pthread_create(&pool.workers[pool.started], NULL, worker, (void *)index) != 0) {
            pool.threads = pool.started + 1; /* fewer threads, same results */
            break;
        }
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void stop_workers(void) {
    pthread_mutex_lock(&pool.sleep);
    atomic_store(&pool.stop, true);
    pthread_cond_broadcast(&pool.work);
    pthread_mutex_unlock(&pool.sleep);
    for (int i = 0; i < pool.started; i++) pthread_join(pool.workers[i], NULL);
    pool.started = 0;
    atomic_store(&pool.stop, false);
}

OC_EXPORT int oc_num_threads(void) { return pool.threads > 0 ? pool.threads : 1; }

OC_EXPORT void oc_set_num_threads(int threads) {
    if (threads < 1) threads = 1;
    if (threads > OC_MAX_THREADS) threads = OC_MAX_THREADS;
    pthread_mutex_lock(&pool.region);
    if (threads - 1 < pool.started) stop_workers();
    pool.threads = threads;
    pthread_mutex_unlock(&pool.region);
}

OC_EXPORT void oc_parallel_for(int64_t items, int64_t grain, oc_task task, void *ctx) {
    if (items <= 0) return;
    if (grain < 1) grain = 1;
    if (inside || items <= grain || pool.threads <= 1 || items > UINT32_MAX) {
        task(ctx, 0, items, 0); /* the ticket counts in 32 bits; no loop of ours comes near */
        return;
    }
    pthread_mutex_lock(&pool.region);
    if (pool.started < pool.threads - 1) start_workers();
    atomic_store_explicit(&pool.task, task, memory_order_relaxed);
    atomic_store_explicit(&pool.ctx, ctx, memory_order_relaxed);
    atomic_store_explicit(&pool.items, items, memory_order_relaxed);
    atomic_store_explicit(&pool.grain, grain, memory_order_relaxed);
    atomic_store_explicit(&pool.share, 2 * pool.threads, memory_order_relaxed);
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    const uint64_t number = (atomic_load(&pool.ticket) >> 32) + 1;
    atomic_store(&pool.ticket, (number << 32) | (uint64_t)items);
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.work);
        pthread_mutex_unlock(&pool.sleep);
    }
    work_off(0);
    wait_for_end(items);
    pthread_mutex_unlock(&pool.region);
}

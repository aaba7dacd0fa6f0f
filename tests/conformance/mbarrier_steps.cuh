// One thread runs 512 steps (operation, operand) on an mbarrier and notes what it answers after each: test_wait of both
// parities and of the last state as bits, and the pending count of a .noComplete arrival.
#define STATE(form) asm volatile("mbarrier." form ".shared::cta.b64 %0, [%1], %2;" : "=l"(s) : "r"(b), "r"(n) : "memory")
#define PLAIN(form) \
    asm volatile("mbarrier." form ".relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(n) : "memory")

__device__ void mbarrier_steps(u64* bar, const u32* steps, u32* log) {
    u32 b = smem(bar);
    u64 s = 0;
    for (u32 i = 0; i < 512; ++i) {
        u32 op = steps[2 * i], n = steps[2 * i + 1], pending = 0xffffffff;
        if (op == 0) STATE("arrive");
        if (op == 1) STATE("arrive.noComplete");
        if (op == 2) STATE("arrive_drop");
        if (op == 3) PLAIN("expect_tx");
        if (op == 4) PLAIN("complete_tx");
        if (op == 5) STATE("arrive.expect_tx");
        if (op == 6) { bar_inval(bar); bar_init(bar, n); }
        if (op == 7) STATE("arrive_drop.noComplete");
        if (op == 8) STATE("arrive_drop.expect_tx");
        u32 answers = bar_test(bar, 0) | bar_test(bar, 1) << 1;
        if (op == 1 || op == 7) asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(pending) : "l"(s));
        if (op != 3 && op != 4 && op != 6) answers |= bar_test_state(bar, s) << 2;
        log[2 * i] = answers;
        log[2 * i + 1] = pending;
    }
}

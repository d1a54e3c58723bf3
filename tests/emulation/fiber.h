// A context with its own stack: Boost.Context where it is installed, ucontext elsewhere (or with
// HVP_EMULATION_UCONTEXT). Every switch is announced to ASan and TSan where one of them is loaded.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

#if !defined(HVP_EMULATION_UCONTEXT) && __has_include(<boost/context/detail/fcontext.hpp>)
#define HVP_EMULATION_BOOST 1
#include <boost/context/detail/fcontext.hpp>
#else
#define HVP_EMULATION_BOOST 0
#include <ucontext.h>
#endif

// The sanitizers' fiber interface; null where none is loaded.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char*, int);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char*, int);
}

namespace emulation {

// What happened before release(token) happens before what follows acquire(token).
inline void acquire(const void* token) {
    if (__tsan_acquire) __tsan_acquire(const_cast<void*>(token));
}
inline void release(const void* token) {
    if (__tsan_release) __tsan_release(const_cast<void*>(token));
}

// Whether TSan is to look away from what this thread reads and writes.
inline void ignore_accesses(bool ignore) {
    const auto annotate = ignore ? AnnotateIgnoreReadsBegin : AnnotateIgnoreReadsEnd;
    if (annotate) annotate(__FILE__, __LINE__);
}

// One identity in TSan's eyes. Switching orders nothing by itself.
class TsanThread {
 public:
    static TsanThread current() { return TsanThread(__tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr); }
    // One that knows nothing of what happened since the first was made: TSan orders a thread after its creator.
    static TsanThread create() {
        if (!__tsan_create_fiber) return TsanThread(nullptr);
        static const TsanThread origin(__tsan_create_fiber(0));
        const TsanThread caller = current();
        origin.become();
        const TsanThread created(__tsan_create_fiber(0));
        caller.become();
        return created;
    }
    void become() const {
        constexpr unsigned kNoSync = 1;
        if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(handle_, kNoSync);
    }

 private:
    explicit TsanThread(void* handle) : handle_(handle) {}
    void* handle_;
};

// Runs on the caller's ("home") stack until resume() and comes back to it at suspend() or finish().
class Fiber {
 public:
    Fiber() : tsan_(TsanThread::create()) {
        char* memory = static_cast<char*>(
            mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (memory == MAP_FAILED) abort();
        mprotect(memory, kGuard, PROT_NONE);
        stack_ = memory + kGuard;
    }
    Fiber(const Fiber&) = delete;

    // The next resume() calls entry, which must end in finish().
    void start(void (*entry)()) {
        entry_ = entry;
        fake_stack_ = nullptr;
#if HVP_EMULATION_BOOST
        context_ = boost::context::detail::make_fcontext(stack_ + kStack, kStack, enter_boost);
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack_;
        context_.uc_stack.ss_size = kStack;
        context_.uc_link = nullptr;
        makecontext(&context_, enter, 0);
#endif
    }

    void resume() {
        void* home_fake_stack = nullptr;
        const TsanThread home_tsan = TsanThread::current();
        running_ = this;
        home_tsan_ = &home_tsan;
        if (__sanitizer_start_switch_fiber) {
            __sanitizer_start_switch_fiber(&home_fake_stack, stack_, kStack);
        }
        tsan_.become();
#if HVP_EMULATION_BOOST
        context_ = boost::context::detail::jump_fcontext(context_, nullptr).fctx;
#else
        swapcontext(&home_context_, &context_);
#endif
        if (__sanitizer_finish_switch_fiber) {
            __sanitizer_finish_switch_fiber(home_fake_stack, nullptr, nullptr);
        }
    }

    static void suspend() { running_->leave(&running_->fake_stack_); }

    [[noreturn]] static void finish() {
        running_->leave(nullptr);
        abort();
    }

 private:
    static constexpr size_t kGuard = 4096;        // bytes; an overflow faults here
    static constexpr size_t kStack = 128 * 1024;  // bytes; the sanitizers' frames are large

    static void enter() {
        running_->arrive();
        running_->entry_();
    }

    void arrive() {
        if (__sanitizer_finish_switch_fiber) {
            __sanitizer_finish_switch_fiber(fake_stack_, &home_stack_, &home_size_);
        }
    }

    void leave(void** keep_fake_stack) {
        home_tsan_->become();
        if (__sanitizer_start_switch_fiber) {
            __sanitizer_start_switch_fiber(keep_fake_stack, home_stack_, home_size_);
        }
#if HVP_EMULATION_BOOST
        home_context_ = boost::context::detail::jump_fcontext(home_context_, nullptr).fctx;
#else
        swapcontext(&context_, &home_context_);
#endif
        arrive();
    }

#if HVP_EMULATION_BOOST
    using Context = boost::context::detail::fcontext_t;
    static void enter_boost(boost::context::detail::transfer_t from) {
        home_context_ = from.fctx;
        enter();
    }
#else
    using Context = ucontext_t;
#endif

    char* stack_;
    void (*entry_)() = nullptr;
    void* fake_stack_ = nullptr;
    TsanThread tsan_;
    Context context_;

    static inline Fiber* running_ = nullptr;
    static inline Context home_context_;
    static inline const TsanThread* home_tsan_ = nullptr;
    static inline const void* home_stack_ = nullptr;
    static inline size_t home_size_ = 0;
};

}  // namespace emulation

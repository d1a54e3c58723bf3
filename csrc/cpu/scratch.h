// Working memory of one call. Allocated before a parallel region: an exception must not leave one.
#pragma once

#include <cstdlib>
#include <new>

#include "isa.h"

namespace hvprune::HVP_ISA {

constexpr int64_t kCacheLine = 64;  // bytes

class Scratch {
 public:
    explicit Scratch(int64_t bytes) : data_(local_) {
        if (bytes <= static_cast<int64_t>(sizeof local_)) return;
        data_ = static_cast<char*>(std::aligned_alloc(kCacheLine, round_up(bytes, kCacheLine)));
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Scratch() {
        if (data_ != local_) std::free(data_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    char* data() const { return data_; }

 private:
    char* data_;
    alignas(kCacheLine) char local_[4096];  // for small inputs, whose kernels take less time than an allocation
};

// Cuts pieces from a block of memory; with a null block it only adds up what they need.
class Carver {
 public:
    explicit Carver(char* block) : block_(block), used_(0) {}

    template <class T>
    T* take(int64_t count) {
        T* piece = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + used_);
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kCacheLine);
        return piece;
    }
    int64_t used() const { return used_; }

 private:
    char* block_;
    int64_t used_;
};

}  // namespace hvprune::HVP_ISA

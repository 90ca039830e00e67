// MLX's allocator as on Metal (mlx/backend/metal/allocator.cpp and mlx/backend/common/buffer_cache.h):
// what is above a page takes whole pages of 16 KiB, and what was freed is used again for what is
// smaller by less than two of them. Loaded before libmlx.so, which then finds these functions first.

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>

#include <mlx/allocator.h>
#include <mlx/memory.h>

namespace mlx::core {

namespace allocator {

namespace {

constexpr size_t page = 16384;

// A function of libmlx.so that this library stands before.
template <typename Function>
Function* original(const char* name) {
  static void* library = dlopen("libmlx.so", RTLD_NOLOAD | RTLD_LAZY);
  return reinterpret_cast<Function*>(dlsym(library, name));
}

Allocator& plain() {
  static auto* found = original<Allocator&()>("_ZN3mlx4core9allocator9allocatorEv");
  return found();
}

class AsOnMetal : public Allocator {
 public:
  Buffer malloc(size_t size) override {
    if (size > page) {
      size = (size + page - 1) / page * page;
    }
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = cached_.lower_bound(size);
    if (found != cached_.end() && *found < std::min(2 * size, size + 2 * page)) {
      size = *found;
      cached_.erase(found);
    }
    return plain().malloc(size);
  }

  // What is kept here is how large the pieces are that a cache holds.
  void free(Buffer buffer) override {
    if (buffer.ptr() != nullptr && has_cache) {
      std::lock_guard<std::mutex> guard(mutex_);
      cached_.insert(plain().size(buffer));
    }
    plain().free(buffer);
  }

  size_t size(Buffer buffer) const override { return plain().size(buffer); }
  Buffer make_buffer(void* ptr, size_t size) override { return plain().make_buffer(ptr, size); }
  void release(Buffer buffer) override { plain().release(buffer); }

  std::atomic<bool> has_cache{true};

  void clear() {
    std::lock_guard<std::mutex> guard(mutex_);
    cached_.clear();
  }

 private:
  std::mutex mutex_;
  std::multiset<size_t> cached_;
};

AsOnMetal& own() {
  static AsOnMetal* made = new AsOnMetal;  // lives as long as any array
  return *made;
}

}  // namespace

Allocator& allocator() { return own(); }

}  // namespace allocator

void clear_cache() {
  allocator::own().clear();
  allocator::original<void()>("_ZN3mlx4core11clear_cacheEv")();
}

size_t set_cache_limit(size_t limit) {
  allocator::own().has_cache = limit > 0;
  return allocator::original<size_t(size_t)>("_ZN3mlx4core15set_cache_limitEm")(limit);
}

}  // namespace mlx::core

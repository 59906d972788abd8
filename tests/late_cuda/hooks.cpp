// What a torch without CUDA lacks and asks for where a tensor says that it is on one: a guard of devices (indexing,
// and "cuda" without a number), hooks (autograd), and an allocator of page-locked memory (so that is_pinned() tells).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
constexpr auto kCuda = c10::DeviceType::CUDA;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCuda; }
  Device exchangeDevice(Device) const override { return Device(kCuda, 0); }
  Device getDevice() const override { return Device(kCuda, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, Device(kCuda, 0)); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, Device(kCuda, 0)); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, Device(kCuda, 0)); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

// Page-locked memory is the host's, remembered, and counted in powers of two as torch takes it.
constexpr size_t kPage = 4096;
std::mutex lock;
std::map<const char*, size_t> page_locked;
size_t live = 0;
size_t peak = 0;

size_t rounded(size_t n) {
  size_t taken = 1;
  while (taken < n) taken *= 2;
  return taken;
}

void forget(void* at) {
  {
    std::lock_guard<std::mutex> held(lock);
    auto found = page_locked.find(static_cast<const char*>(at));
    live -= rounded(found->second);
    page_locked.erase(found);
  }
  std::free(at);
}

struct PageLocked final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* at = std::aligned_alloc(kPage, (n / kPage + 1) * kPage);
    {
      std::lock_guard<std::mutex> held(lock);
      page_locked[static_cast<const char*>(at)] = n;
      live += rounded(n);
      peak = std::max(peak, live);
    }
    return {at, at, &forget, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &forget; }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }
};
PageLocked allocator;

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* at) const override {
    std::lock_guard<std::mutex> held(lock);
    auto next = page_locked.upper_bound(static_cast<const char*>(at));
    if (next == page_locked.begin()) return false;
    --next;
    return static_cast<const char*>(at) < next->first + next->second;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &allocator; }
};
}  // namespace

extern "C" size_t late_cuda_page_locked_live() {
  std::lock_guard<std::mutex> held(lock);
  return live;
}
extern "C" size_t late_cuda_page_locked_peak() {
  std::lock_guard<std::mutex> held(lock);
  return peak;
}
extern "C" void late_cuda_page_locked_reset() {
  std::lock_guard<std::mutex> held(lock);
  peak = live;
}

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

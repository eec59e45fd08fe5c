// A CUDA device that does nothing, for torch built without CUDA. With it, tensors without values on "cuda" run forward
// and backward: autograd asks the guard for devices and streams, and the hooks for pinned memory. Methods are not marked
// `override`, so that one which a version of torch does not have is no error.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>
#include <mutex>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

c10::Stream stream(c10::StreamId id = 0) {
  return c10::Stream(c10::Stream::UNSAFE, kDevice, id);
}

thread_local c10::StreamId current = 0;

struct NoGuard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  NoGuard() = default;
  explicit NoGuard(c10::DeviceType) {}
  c10::DeviceType type() const { return static_type; }
  c10::Device exchangeDevice(c10::Device) const { return kDevice; }
  c10::Device getDevice() const { return kDevice; }
  void setDevice(c10::Device) const {}
  void uncheckedSetDevice(c10::Device) const noexcept {}
  c10::DeviceIndex deviceCount() const noexcept { return 1; }
  c10::Stream getStream(c10::Device) const { return stream(current); }
  c10::Stream getDefaultStream(c10::Device) const { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool = false) const { return stream(1); }
  c10::Stream getNewStream(c10::Device, int = 0) const { return stream(1); }
  c10::Stream exchangeStream(c10::Stream next) const {
    const auto before = current;
    current = next.id();
    return stream(before);
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const {}
  void block(void*, const c10::Stream&) const {}
  bool queryEvent(void*) const { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept {}
  bool queryStream(const c10::Stream&) const { return true; }
  void synchronizeStream(const c10::Stream&) const {}
  void synchronizeEvent(void*) const {}
  void synchronizeDevice(const c10::DeviceIndex) const {}
};

// Memory of the host that knows that it is pinned.
std::mutex lock;
std::map<const void*, std::pair<size_t, c10::DataPtr>> pinned;

void release(void* start) {
  c10::DataPtr owner;
  const std::lock_guard<std::mutex> hold(lock);
  owner = std::move(pinned.at(start).second);
  pinned.erase(start);
}

struct PinnedAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t size) {
    auto owner = c10::GetCPUAllocator()->allocate(size);
    void* start = owner.get();
    if (start != nullptr) {
      const std::lock_guard<std::mutex> hold(lock);
      pinned.emplace(start, std::make_pair(size, std::move(owner)));
    }
    return {start, start, start == nullptr ? nullptr : &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const { return &release; }
  void copy_data(void* to, const void* from, size_t count) const { default_copy_data(to, from, count); }
};

PinnedAllocator allocator;

struct NoHooks final : public at::CUDAHooksInterface {
  explicit NoHooks(at::CUDAHooksArgs) {}
  void init() const {}
  bool hasCUDA() const { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  int getNumGPUs() const { return 1; }
  c10::DeviceIndex deviceCount() const { return 1; }
  c10::DeviceIndex current_device() const { return 0; }
  c10::DeviceIndex getCurrentDevice() const { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const {}
  void deviceSynchronize(c10::DeviceIndex) const {}
  c10::Allocator* getPinnedMemoryAllocator() const { return &allocator; }
  bool isPinnedPtr(const void* data) const {
    const std::lock_guard<std::mutex> hold(lock);
    auto after = pinned.upper_bound(data);
    if (after == pinned.begin()) {
      return false;
    }
    const auto& found = *--after;
    return static_cast<const char*>(data) < static_cast<const char*>(found.first) + found.second.first;
  }
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoGuard)
}
namespace at {
using ::NoHooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, NoHooks)
}

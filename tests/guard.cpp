// PyTorch's build for CPUs has no CUDA. This library makes it accept the device "cuda" for fake tensors: one device with one
// stream, on which nothing runs.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
};
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }

struct CUDAHooks final : at::CUDAHooksInterface {  // torch looks for this name; autograd needs it
  CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }

// A device of torch's PrivateUse1 kind whose memory is the host's and whose operators are the CPU's.
//
// It keeps the rule of a GPU that matters to a caller: tensors of one operator are on one device. Operators
// without a kernel below go through `fallback`, which refuses mixed devices, then runs the CPU's kernel.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <set>
#include <string>

namespace {

using at::IntArrayRef;
using at::Tensor;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;

struct HostMemory final : c10::Allocator {
  static void release(void* pointer) { free(pointer); }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {pointer, pointer, &release, c10::Device(kDevice, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
HostMemory memory;
REGISTER_ALLOCATOR(kDevice, &memory);

// One device with one stream, on which everything has happened when a call returns.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Device device() { return c10::Device(kDevice, 0); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};
Hooks hooks;
const bool hooked = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
Tensor on_host(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       tensor.options().device(at::kCPU).requires_grad(false));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  if (target.numel()) on_host(target).copy_(on_host(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  at::native::resize_(target, source.sizes(), std::nullopt);
  return copy_from(source, target, false);
}

Tensor on_device(const Tensor& tensor) { return tensor.defined() ? tensor.to(Guard::device()) : tensor; }

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  std::optional<Tensor> host_bias;
  if (bias && bias->defined()) host_bias = on_host(*bias);
  return on_device(at::convolution_symint(on_host(input), on_host(weight), host_bias, stride, padding, dilation,
                                          transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  const c10::SymInt outputs = grad.size(1);
  auto [inputs, weights, bias] = at::convolution_backward_symint(
      on_host(grad), on_host(input), on_host(weight), c10::SymIntArrayRef(&outputs, 1), stride, padding, dilation,
      transposed, output_padding, groups, mask);
  return {on_device(inputs), on_device(weights), on_device(bias)};
}

// What a GPU takes from the CPU beside its own tensors: single numbers, and indices of index and index_put.
void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  static const std::set<std::string> indexing{"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                              "aten::index_put"};
  const auto& arguments = op.schema().arguments();
  const bool indexed = indexing.count(op.schema().name());
  auto check = [&](const Tensor& tensor, const std::string& argument) {
    if (!tensor.defined() || tensor.dim() == 0 || tensor.device().type() == kDevice) return;
    if (indexed && argument == "indices") return;
    TORCH_CHECK(false, op.schema().name(), ": argument '", argument, "' of shape ", tensor.sizes(), " is on ",
                tensor.device(), ", others are on the device");
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = stack[stack.size() - arguments.size() + i];
    if (value.isTensor()) check(value.toTensor(), arguments[i].name());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorList()) check(tensor, arguments[i].name());
    if (value.isOptionalTensorList())
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
        if (tensor) check(*tensor, arguments[i].name());
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, *stack);
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", [](const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) -> const Tensor& {
    return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
  });
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.doc() = "torch's PrivateUse1 device in host memory"; }

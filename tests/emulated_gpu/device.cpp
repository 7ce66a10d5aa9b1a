// A CUDA device in the memory of the CPU, for a torch that is built without CUDA. It computes with the CPU's kernels, and
// refuses what a GPU refuses: operands on different devices, and matrix products of integers. See __main__.py.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/as_strided_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <atomic>
#include <cstdlib>
#include <set>

using at::Tensor;
using c10::Device;
using c10::IntArrayRef;
using c10::IValue;

namespace {

const Device kCard(c10::kCUDA, 0);
std::atomic<int64_t> held{0}, most{0};

// --- memory -------------------------------------------------------------------------------------------------

struct Block {
  size_t size;
  void* data;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  held -= static_cast<int64_t>(block->size);
  std::free(block->data);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = nullptr;
    TORCH_CHECK(size == 0 || posix_memalign(&data, 64, size) == 0, "no memory");
    held += static_cast<int64_t>(size);
    most = std::max(most.load(), held.load());
    return {data, new Block{size, data}, &release, kCard};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};

Allocator allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &allocator);

// --- the device ---------------------------------------------------------------------------------------------

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kCard); }
  Device exchangeDevice(Device) const override { return kCard; }
  Device getDevice() const override { return kCard; }
  c10::Stream getStream(Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getNewStream(Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace

namespace at {

struct Hooks : CUDAHooksInterface {
  explicit Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }
  Device getDeviceFromPtr(void*) const override { return kCard; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

}  // namespace at

namespace {

// --- tensors ------------------------------------------------------------------------------------------------

const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

Tensor empty(IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &allocator, kKeys, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  auto keep = tensor.storage();
  void* data = tensor.numel() ? tensor.data_ptr() : nullptr;
  auto options = tensor.options().device(c10::kCPU).requires_grad(false);
  Tensor same = at::from_blob(data, tensor.sizes(), tensor.strides(), [keep](void*) {}, options);
  if (tensor.is_conj()) same._set_conj(true);
  if (tensor.is_neg()) same._set_neg(true);
  return same;
}

Tensor on_card(const Tensor& tensor) {
  Tensor dense = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
  Tensor copy = empty_strided(dense.sizes(), dense.strides(), dense.scalar_type(), {}, {}, {});
  if (dense.numel()) std::memcpy(copy.data_ptr(), dense.data_ptr(), dense.nbytes());
  return copy;
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  if (self.numel() || source.numel()) {
    Tensor to = self.is_cuda() ? on_cpu(self) : self;
    to.copy_(source.is_cuda() ? on_cpu(source) : source);
  }
  return self;
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t needed = (c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size();
  auto storage = self.storage();
  if (storage.nbytes() < needed) {
    auto data = allocator.allocate(needed);
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor as_strided(const Tensor& self, IntArrayRef sizes, IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

Tensor& set_to_part(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  TORCH_CHECK(storage.device().is_cuda(), "a tensor on cuda:0 can't have a storage on ", storage.device());
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(storage);
  tensor->set_storage_offset(offset);
  if (strides.size() == sizes.size()) {
    tensor->set_sizes_and_strides(sizes, strides);
  } else {
    tensor->set_sizes_contiguous(sizes);
  }
  return self;
}

Tensor& set_to_storage(Tensor& self, at::Storage storage) {
  const int64_t size = storage.nbytes() / self.element_size();
  return set_to_part(self, storage, 0, {size}, {});
}

Tensor& set_to_tensor(Tensor& self, const Tensor& source) {
  return set_to_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// --- all other operators ------------------------------------------------------------------------------------

struct Call {
  const c10::FunctionSchema& schema;
  const std::string& name;
  std::vector<IValue> given;
  std::vector<std::pair<Tensor, Tensor>> seen;  // a tensor of the card, and its memory as a tensor of the CPU
  std::vector<std::pair<Tensor, Tensor>> grown;  // an empty output, and the one that the CPU's kernel may resize

  void check_devices() const {
    // As on a GPU, numbers on the CPU and indices on the CPU are allowed.
    const bool indexes = name.find("index") != std::string::npos;
    bool card = false, cpu = false;
    auto see = [&](const Tensor& tensor, bool may_differ) {
      if (!tensor.defined()) return;
      card |= tensor.is_cuda();
      cpu |= tensor.is_cpu() && tensor.dim() > 0 && !may_differ;
      TORCH_CHECK(tensor.is_cuda() || tensor.is_cpu(), name, " has a tensor on ", tensor.device());
    };
    for (const auto& value : given) {
      if (value.isTensor()) see(value.toTensor(), false);
      if (value.isTensorList())
        for (const Tensor tensor : value.toTensorList()) see(tensor, false);
      if (value.isOptionalTensorList())
        for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
          if (tensor) see(*tensor, indexes);
      card |= value.isDevice() && value.toDevice().is_cuda();
    }
    TORCH_CHECK(!(card && cpu), "Expected all tensors to be on the same device, but found cuda:0 and cpu in ", name);
  }

  Tensor in(const Tensor& tensor, bool written) {
    static const std::set<std::string> products{"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addmv"};
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    TORCH_CHECK(!(products.count(name) && c10::isIntegralType(tensor.scalar_type(), true)), name,
                " is not implemented for '", tensor.scalar_type(), "' on a GPU");
    Tensor same = on_cpu(tensor);
    if (written && tensor.numel() == 0) {
      same = at::empty(tensor.sizes(), same.options());
      grown.emplace_back(tensor, same);
    }
    seen.emplace_back(tensor, same);
    return same;
  }

  IValue in(const IValue& value, bool written) {
    if (value.isTensor()) return in(value.toTensor(), written);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor tensor : value.toTensorList()) list.push_back(in(tensor, written));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<Tensor>(in(*tensor, false)) : std::nullopt);
      return list;
    }
    return value.isDevice() && value.toDevice().is_cuda() ? IValue(Device(c10::kCPU)) : value;
  }

  // An argument, a view of one, or something new.
  Tensor out(const Tensor& tensor, bool view) const {
    if (!tensor.defined()) return tensor;
    for (const auto& [card, cpu] : seen)
      if (tensor.is_same(cpu)) return card;
    if (view && tensor.numel())
      for (const auto& [card, cpu] : seen) {
        const char* start = static_cast<const char*>(card.storage().data());
        const char* place = static_cast<const char*>(tensor.data_ptr());
        if (start && start <= place && place < start + card.storage().nbytes())
          return at::native::as_strided_tensorimpl(card, tensor.sizes(), tensor.strides(), (place - start) / tensor.element_size());
      }
    return on_card(tensor);
  }

  IValue out(const IValue& value, const c10::AliasInfo* alias) const {
    if (alias && alias->isWrite() && value.isTensor())
      for (size_t i = 0; i < given.size(); i++) {
        const auto* other = schema.arguments()[i].alias_info();
        if (other && *other == *alias) return given[i];
      }
    if (value.isTensor()) return out(value.toTensor(), alias != nullptr);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor tensor : value.toTensorList()) list.push_back(out(tensor, alias != nullptr));
      return list;
    }
    return value;
  }
};

void run_on_cpu(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto& schema = op.schema();
  auto arguments = torch::jit::last(stack, schema.arguments().size());
  Call call{schema, schema.operator_name().name, std::vector<IValue>(arguments.begin(), arguments.end()), {}, {}};
  call.check_devices();
  torch::jit::drop(stack, call.given.size());
  for (size_t i = 0; i < call.given.size(); i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    stack->push_back(call.in(call.given[i], alias && alias->isWrite()));
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& [card, cpu] : call.grown)
    if (cpu.numel()) {
      resize_(card, c10::fromIntArrayRefSlow(cpu.sizes()), {});
      on_cpu(card).copy_(cpu);
    }
  const size_t first = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); i++)
    (*stack)[first + i] = call.out((*stack)[first + i], schema.returns()[i].alias_info());
}

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 0;  // no fused kernel
}

const bool attends = (at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&plain_attention), true);

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("copy_", copy_);
  m.impl("resize_", resize_);
  m.impl("set_.source_Tensor", set_to_tensor);
  m.impl("set_.source_Storage", set_to_storage);
  m.impl("set_.source_Storage_storage_offset", set_to_part);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

PYBIND11_MODULE(device, m) {
  m.def("held", [] { return held.load(); });
  m.def("most", [] { return most.load(); });
  m.def("forget", [] { most = held.load(); });
}

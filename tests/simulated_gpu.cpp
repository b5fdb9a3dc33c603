// A GPU that is not there: tensors of the device "cuda" in the host's memory, whose kernels are those of the processor.
//
// It is strict where programs for GPUs go wrong. Tensors of two devices cannot meet in one kernel; an operation for
// which the host waits is counted; and what is recorded as a graph is not executed, but replayed on the same memory.
// For a build of torch without CUDA; to be loaded before torch, which looks for its devices once.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Generator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::IValue;
using c10::Stream;

const Device GPU(c10::DeviceType::CUDA, 0);

// ---------------------------------------------------------------- memory

std::atomic<int64_t> allocated{0}, peak{0}, limit{INT64_MAX};

struct Block {
  void* data;
  int64_t size;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->size;
  c10::free_cpu(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto asked = static_cast<int64_t>(size);
    TORCH_CHECK_WITH(OutOfMemoryError, allocated + asked <= limit, "CUDA out of memory. Tried to allocate ", asked, " bytes");
    auto* block = new Block{c10::alloc_cpu(size), asked};
    if (size) {
      std::memset(block->data, 0xFF, size);  // NaN, so that what nobody has written shows where it is read
    }
    int64_t now = allocated += asked, earlier = peak;
    while (now > earlier && !peak.compare_exchange_weak(earlier, now)) {
    }
    return {block->data, block, &release, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
} memory;

std::mutex pinned_mutex;
std::unordered_set<const void*> pinned;

void unpin(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(data);
  }
  c10::free_cpu(data);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size ? size : 1);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(data);
    return {data, data, &unpin, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
} pinned_memory;

// ---------------------------------------------------------------- the device, as the rest of torch asks for it

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, GPU); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

at::Generator generator = at::detail::createCPUGenerator(0);

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.count(data) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

// ---------------------------------------------------------------- waiting, recording, replaying

std::atomic<int64_t> sync_debug_mode{0};  // of waits: 0 says nothing, 1 warns, 2 refuses

struct Call {
  c10::OperatorHandle op;
  c10::Stack arguments, results;
};
using Graph = std::vector<Call>;
std::mutex graphs_mutex;
std::vector<std::shared_ptr<Graph>> graphs;
thread_local std::shared_ptr<Graph> recording;
thread_local std::vector<std::pair<Tensor, Tensor>> overwritten;  // what a recording writes to, and what stood there

void wait(const std::string& name) {
  TORCH_CHECK(!recording, "operation not permitted when stream is capturing: ", name);
  TORCH_CHECK(sync_debug_mode != 2, "called a synchronizing CUDA operation: ", name);
  if (sync_debug_mode == 1) {
    TORCH_WARN("called a synchronizing CUDA operation: ", name);
  }
}

bool on_gpu(const Tensor& x) {
  return x.defined() && x.device().is_cuda();
}

// The same memory as a tensor of the processor.
Tensor host(const Tensor& x) {
  if (!on_gpu(x)) {
    return x;
  }
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), x.storage().nbytes(), c10::DataPtr(x.storage().mutable_data(), c10::kCPU),
      c10::GetCPUAllocator(), true);
  Tensor out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return out;
}

Tensor device(const Tensor& x) {
  if (!x.defined() || x.device().is_cuda()) {
    return x;
  }
  Tensor out = at::detail::empty_strided_generic(
      x.sizes(), x.strides(), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), x.scalar_type());
  host(out).copy_(x);
  return out;
}

// Applies `f` to every tensor of a value: tensors, lists of tensors and lists of optional tensors.
template <class F>
IValue mapped(const IValue& value, F f) {
  if (value.isTensor()) {
    return f(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& x : value.toTensorVector()) {
      out.push_back(f(x));
    }
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const std::optional<Tensor>& x : value.toOptionalTensorList()) {
      out.push_back(x.has_value() ? std::optional<Tensor>(f(*x)) : x);
    }
    return out;
  }
  return value;
}

const std::set<std::string> WAITING{
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::bincount"};
const std::set<std::string> INDEXING{"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
const std::set<std::string> PRODUCTS{"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::dot"};
const std::set<std::string> NEVER_FROM_THE_HOST{"index", "indices", "mask", "target"};

// That a GPU has this kernel, that its arguments lie there, and whether the host waits for it.
void check(const c10::OperatorHandle& op, const c10::Stack& arguments) {
  const std::string& name = op.schema().name();
  TORCH_CHECK_NOT_IMPLEMENTED(
      name.rfind("aten::", 0) == 0 || name.rfind("bitsandbytes::", 0) == 0, name, ": no kernel for the device cuda");
  TORCH_CHECK(
      !PRODUCTS.count(name) || !c10::isIntegralType(arguments[0].toTensor().scalar_type(), true), name,
      ": not implemented for integers on the device cuda");
  bool indexing = INDEXING.count(name) > 0, sizes_of_data = WAITING.count(name) > 0;
  for (size_t i = 0; i < arguments.size(); i++) {
    mapped(arguments[i], [&](const Tensor& x) {
      if (!x.defined()) {
        return x;
      }
      if (indexing && i == 1) {
        bool mask = x.scalar_type() == at::kBool || x.scalar_type() == at::kByte;
        sizes_of_data |= mask || (!on_gpu(x) && !x.is_pinned());
      } else if (
          !on_gpu(x) && x.device().is_cpu() &&
          (x.dim() > 0 || NEVER_FROM_THE_HOST.count(op.schema().arguments()[i].name()))) {
        TORCH_CHECK(
            false, "Expected all tensors to be on the same device, but found cuda:0 and cpu in ", name, ", argument ",
            op.schema().arguments()[i].name());
      }
      return x;
    });
  }
  if (name == "aten::repeat_interleave" && arguments.size() == 2 && arguments[1].isNone()) {
    sizes_of_data = true;
  }
  if (sizes_of_data) {
    wait(name);
  }
}

void keep(const Tensor& x) {
  if (on_gpu(x) && x.numel() > 0) {
    overwritten.emplace_back(x, host(x).clone());
  }
}

// Calls the processor's kernel, with the random numbers of the GPU. Of integers it has no histogram: they become floats.
void compute(const c10::OperatorHandle& op, c10::Stack* stack) {
  std::optional<at::ScalarType> counts;
  if (op.schema().name() == "aten::histc" && c10::isIntegralType((*stack)[0].toTensor().scalar_type(), false)) {
    counts = (*stack)[0].toTensor().scalar_type();
    (*stack)[0] = (*stack)[0].toTensor().to(at::kDouble);
  }
  bool random = op.hasTag(at::Tag::nondeterministic_seeded);
  at::Generator usual = at::detail::getDefaultCPUGenerator();
  Tensor state;
  if (random) {
    state = usual.get_state();
    usual.set_state(generator.get_state());
  }
  op.callBoxed(stack);
  if (random) {
    generator.set_state(usual.get_state());
    usual.set_state(state);
  }
  if (counts) {
    (*stack)[0] = (*stack)[0].toTensor().to(*counts);
  }
}

bool writes(const c10::Argument& argument) {
  return argument.alias_info() && argument.alias_info()->isWrite();
}

// The argument that a return is, or the number of arguments where it is a new value.
size_t source_of(const c10::FunctionSchema& schema, const c10::Argument& returned) {
  const auto& arguments = schema.arguments();
  for (size_t i = 0; returned.alias_info() && i < arguments.size(); i++) {
    if (writes(arguments[i]) && arguments[i].alias_info()->beforeSets() == returned.alias_info()->beforeSets()) {
      return i;
    }
  }
  TORCH_CHECK(!returned.alias_info(), "no view of a simulated GPU's tensor: ", schema.name());
  return arguments.size();
}

// Runs the processor's kernel on the memory of the arguments; what it makes becomes the GPU's.
void run(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto& schema = op.schema();
  size_t count = schema.arguments().size();
  c10::Stack given(stack->end() - count, stack->end()), lent, results;
  stack->resize(stack->size() - count);
  check(op, given);
  bool makes_here = true;  // whether results lie on the GPU
  for (size_t i = 0; i < count; i++) {
    if (recording && writes(schema.arguments()[i])) {
      mapped(given[i], [](const Tensor& x) { return keep(x), x; });
    }
    makes_here &= !given[i].isDevice() || given[i].toDevice().is_cuda();
    lent.push_back(given[i].isDevice() ? IValue(Device(c10::kCPU)) : mapped(given[i], host));
  }
  c10::Stack kept = lent;
  compute(op, &lent);
  for (size_t i = 0; i < count; i++) {  // arguments that the kernel gave another size
    if (writes(schema.arguments()[i]) && given[i].isTensor()) {
      const Tensor &x = given[i].toTensor(), &y = kept[i].toTensor();
      if (on_gpu(x) && (x.sizes() != y.sizes() || x.strides() != y.strides())) {
        at::native::resize_(x, y.sizes(), std::nullopt);
        host(x).copy_(y);
      }
    }
  }
  for (size_t i = 0; i < lent.size(); i++) {
    size_t from = source_of(schema, schema.returns()[i]);
    results.push_back(from < count ? given[from] : makes_here ? mapped(lent[i], device) : lent[i]);
  }
  if (recording) {
    recording->push_back({op, given, results});
  }
  stack->insert(stack->end(), results.begin(), results.end());
}

// ---------------------------------------------------------------- what concerns memory rather than numbers

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (on_gpu(to) != on_gpu(from) && !non_blocking) {
    wait("aten::copy_");
  }
  if (recording) {
    TORCH_CHECK(on_gpu(to) || !on_gpu(from), "a recorded copy to the host would never be read");
    keep(to);
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    recording->push_back({op, {to, from, non_blocking}, {to}});
  }
  host(to).copy_(host(from));
  return to;
}

at::Scalar local_scalar(const Tensor& x) {
  wait("aten::_local_scalar_dense");
  return at::_local_scalar_dense(host(x));
}

void record_stream(Tensor&, Stream) {}

void capture_begin() {
  TORCH_CHECK(!recording, "a graph is being recorded already");
  recording = std::make_shared<Graph>();
}

int64_t capture_end() {
  auto graph = std::move(recording);
  recording = nullptr;
  for (auto at = overwritten.rbegin(); at != overwritten.rend(); ++at) {  // what is recorded is not executed
    host(at->first).copy_(at->second);
  }
  overwritten.clear();
  std::lock_guard<std::mutex> lock(graphs_mutex);
  graphs.push_back(graph);
  return static_cast<int64_t>(graphs.size()) - 1;
}

void forget(int64_t number) {
  std::lock_guard<std::mutex> lock(graphs_mutex);
  graphs.at(number) = nullptr;
}

void replay(int64_t number) {
  std::shared_ptr<Graph> graph;
  {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    graph = graphs.at(number);
  }
  for (const Call& call : *graph) {
    c10::Stack stack;
    for (const IValue& value : call.arguments) {
      stack.push_back(value.isDevice() ? IValue(Device(c10::kCPU)) : mapped(value, host));
    }
    compute(call.op, &stack);
    for (size_t i = 0; i < stack.size(); i++) {
      if (call.op.schema().returns()[i].alias_info()) {
        continue;  // written in its place
      }
      std::vector<Tensor> made;
      mapped(stack[i], [&](const Tensor& x) { return made.push_back(x), x; });
      size_t at = 0;
      mapped(call.results[i], [&](const Tensor& x) {
        if (x.defined()) {
          host(x).copy_(made[at]);
        }
        at++;
        return x;
      });
    }
  }
}

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("record_stream", record_stream);
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run>());  // not by kernels that GPUs alone have
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run>());
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, c10::Storage)>(&at::native::set_));
  m.impl("set_.source_Tensor", at::native::set_tensor_);
}

// bitsandbytes' kernels for processors; what it compiles for other devices takes minutes.
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {
  for (const char* name : {"quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}

TORCH_LIBRARY(simulated_gpu, m) {
  m.def("recording() -> bool", [] { return recording != nullptr; });
  m.def("peek(Tensor x) -> int[]", [](const Tensor& x) {
    Tensor all = host(x).to(at::kLong).contiguous();
    return std::vector<int64_t>(all.data_ptr<int64_t>(), all.data_ptr<int64_t>() + all.numel());
  });
  m.def("debug() -> int", [] { return sync_debug_mode.load(); });
  m.def("set_debug(int mode) -> ()", [](int64_t mode) { sync_debug_mode = mode; });
  m.def("allocated() -> int", [] { return allocated.load(); });
  m.def("peak() -> int", [] { return peak.load(); });
  m.def("reset_peak() -> ()", [] { peak = allocated.load(); });
  m.def("limit() -> int", [] { return limit.load(); });
  m.def("set_limit(int bytes) -> ()", [](int64_t bytes) { limit = bytes; });
  m.def("seed(int seed) -> ()", [](int64_t seed) { generator.set_current_seed(seed); });
  m.def("initial_seed() -> int", [] { return static_cast<int64_t>(generator.current_seed()); });
  m.def("rng_state() -> Tensor", [] { return generator.get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) { generator.set_state(state); });
  m.def("capture_begin() -> ()", capture_begin);
  m.def("capture_end() -> int", capture_end);
  m.def("replay(int graph) -> ()", replay);
  m.def("forget(int graph) -> ()", forget);
}

static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard);
static bool registered = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, &memory);
  return true;
}();

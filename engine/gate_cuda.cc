#include "engine/gate_cuda.h"

#include <utility>

#include "engine/ground/error.h"

namespace flashpack::internal::cuda {

namespace {

// An event that is recorded during a capture breaks the capture, or becomes part of the graph and never completes.
void require_no_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = taken(cudaStreamIsCapturing(stream, &status));
  if (error == cudaErrorStreamCaptureImplicit) {
    throw argument_error(
        "transfer behind the legacy default stream while a stream that it waits for is captured into a CUDA graph");
  }
  check(error, "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) {
    throw argument_error("transfer behind a stream that is captured into a CUDA graph");
  }
}

class CudaGate final : public Gate {
 public:
  CudaGate(const Context& context, cudaStream_t stream) : context_(context) {
    const ContextGuard guard(context_);
    check(guard.error(), "the device's context");
    require_no_capture(stream);
    Event event = make_event();  // A local, because a member would be destroyed after the guard, in another context.
    check(cudaEventRecord(event.get(), stream), "cudaEventRecord on the caller's stream");
    event_ = std::move(event);
  }
  ~CudaGate() override {
    const ContextGuard guard(context_);
    give_back(event_, guard);
  }

  bool is_open(std::error_code& error) noexcept override {
    const ContextGuard guard(context_);
    const cudaError_t result = guard.error() != cudaSuccess ? guard.error() : taken(cudaEventQuery(event_.get()));
    if (result == cudaErrorNotReady) return false;
    if (result != cudaSuccess) error = code_of(result);
    return true;
  }

 private:
  const Context context_;
  Event event_;
};

}  // namespace

std::unique_ptr<Gate> make_gate(const Context& context, cudaStream_t stream) {
  return std::make_unique<CudaGate>(context, stream);
}

}  // namespace flashpack::internal::cuda

#include "bench/support/link_copies_cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <system_error>

#include "flashpack/error.h"

namespace flashpack::bench {

namespace {

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::system_error(static_cast<int>(error), cuda_category(), call);
}

}  // namespace

LockedPages::LockedPages(std::span<std::byte> memory) : memory_(memory.data()) {
  if (cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterDefault) == cudaSuccess) return;
  cudaGetLastError();  // It is no error of the calls after this.
  memory_ = nullptr;
}

LockedPages::~LockedPages() {
  if (memory_ != nullptr) cudaHostUnregister(memory_);
}

void LinkCopies::Destroy::operator()(CUstream_st* stream) const { cudaStreamDestroy(stream); }

LinkCopies::LinkCopies(const DeviceMemory& target, std::span<const std::byte> source, std::size_t copy_bytes,
                       unsigned streams)
    : target_(target.data()), source_(source), copy_bytes_(copy_bytes), streams_(streams) {
  for (auto& stream : streams_) {
    cudaStream_t made = nullptr;
    check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    stream.reset(made);
  }
}

void LinkCopies::run(std::size_t passes) const {
  for (std::size_t pass = 0; pass < passes; ++pass) {
    for (std::size_t at = 0; at < source_.size(); at += copy_bytes_) {
      check(cudaMemcpyAsync(target_ + at, source_.data() + at, std::min(copy_bytes_, source_.size() - at),
                            cudaMemcpyHostToDevice, streams_[at / copy_bytes_ % streams_.size()].get()),
            "cudaMemcpyAsync");
    }
  }
  for (const auto& stream : streams_) check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
}

}  // namespace flashpack::bench

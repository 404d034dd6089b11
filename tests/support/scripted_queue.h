/// A queue of the pipeline whose operations end when a test says so.
#pragma once

#include <chrono>
#include <optional>
#include <span>
#include <vector>

#include "engine/io_queue.h"

namespace flashpack::testing {

/// Carries nothing out. The test says how operations end.
template <class Interface>
class ScriptedQueue final : public Interface {
 public:
  using Request = typename Interface::Request;
  struct Pushed {
    unsigned tag;
    Request request;
  };

  void push(unsigned tag, const Request& request) override { pushed.push_back({tag, request}); }
  void cancel(unsigned tag) override { cancelled.push_back(tag); }
  std::span<const internal::IoCompletion> wait(std::optional<std::chrono::nanoseconds>) override {
    returned_.clear();
    returned_.swap(ended);
    return returned_;
  }
  void wake() noexcept override {}

  std::vector<Pushed> pushed;
  std::vector<unsigned> cancelled;
  std::vector<internal::IoCompletion> ended;

 private:
  std::vector<internal::IoCompletion> returned_;
};

}  // namespace flashpack::testing

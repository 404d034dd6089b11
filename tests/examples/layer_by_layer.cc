// Starts to compute on the first layers of a model while its tail is read.
//
// The file keeps its tensors in the order of their names, so that the embedding, which is needed first, lies at the
// end. One load asks for all of them: an extent for each, whose priority is the step at which it is needed. An event
// loop on poll(2) is told of each extent that has landed, and runs every step whose weights are there. The same works
// with epoll, libuv or GLib. Exits with 0 if the result is that of a model that was read as a whole.
#include <flashpack/engine.h>
#include <flashpack/event_queue.h>
#include <flashpack/host_memory.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <span>
#include <system_error>
#include <vector>

#include "tests/examples/temp_folder.h"

namespace {

constexpr std::size_t kLayers = 24;
constexpr std::size_t kSteps = kLayers + 1;                   // The embedding, then the layers.
constexpr std::size_t kWeights = (std::size_t{2} << 20) / 4;  // 2 MiB for each.
constexpr std::size_t kBytes = kWeights * sizeof(std::uint32_t);

using Weights = std::span<const std::uint32_t, kWeights>;

// The place in the file of the weights that a step needs.
std::size_t place_of(std::size_t step) { return step == 0 ? kLayers : step - 1; }

// Stands for a layer's work: its result depends on every weight and on the result of the layer before.
std::uint64_t compute(std::uint64_t activation, Weights weights) {
  for (const std::uint32_t weight : weights) activation = activation * 6364136223846793005u + weight;
  return activation;
}

std::vector<std::uint32_t> make_model() {
  std::vector<std::uint32_t> model(kSteps * kWeights);
  std::mt19937 random(1);
  std::ranges::generate(model, random);
  return model;
}

/// The model while it is loaded and run.
class Run {
 public:
  Run(flashpack::Engine& engine, const std::filesystem::path& path)
      : engine_(engine), memory_(engine.options().memory_pool, kSteps * kBytes) {
    request_.report_extents = true;
    request_.files.push_back({.path = path});
    for (std::size_t step = 0; step < kSteps; ++step) {
      const std::uint64_t offset = place_of(step) * kBytes;
      request_.files[0].extents.push_back({.offset_bytes = offset,
                                           .size_bytes = kBytes,
                                           .target = memory_.data() + offset,
                                           .priority = static_cast<std::uint16_t>(step)});
    }
  }

  // Returns the result.
  std::uint64_t operator()() {
    flashpack::EventQueue queue;
    const flashpack::Transfer load = queue.start_load(engine_, request_, 0);
    while (!finished_) {
      pollfd readable{.fd = queue.fd(), .events = POLLIN, .revents = 0};
      if (::poll(&readable, 1, -1) < 0) throw std::system_error(errno, std::generic_category(), "poll");
      take_events(queue);
      run_steps(load);
    }
    return activation_;
  }

  std::size_t steps_before_the_end() const { return steps_before_the_end_; }

 private:
  void take_events(flashpack::EventQueue& queue) {
    std::array<flashpack::Event, 16> events;
    for (const flashpack::Event& event : std::span(events).first(queue.take(events))) {
      if (event.error) throw std::system_error(event.error, "load");
      if (event.kind == flashpack::Event::Kind::kLanded) landed_[event.extent] = true;
      if (event.kind == flashpack::Event::Kind::kDone) finished_ = true;
    }
  }

  // Runs the steps whose weights are there, in order.
  void run_steps(const flashpack::Transfer& load) {
    for (; next_step_ < kSteps && landed_[next_step_]; ++next_step_) {
      const std::byte* const weights = memory_.data() + place_of(next_step_) * kBytes;
      activation_ = compute(activation_, Weights(reinterpret_cast<const std::uint32_t*>(weights), kWeights));
      if (!load.progress().finished) ++steps_before_the_end_;
    }
  }

  flashpack::Engine& engine_;
  flashpack::HostMemory memory_;
  flashpack::LoadRequest request_;
  std::array<bool, kSteps> landed_{};
  std::size_t next_step_ = 0;
  std::size_t steps_before_the_end_ = 0;
  bool finished_ = false;
  std::uint64_t activation_ = 1;
};

}  // namespace

int main() try {
  const std::vector<std::uint32_t> model = make_model();
  std::uint64_t expected = 1;
  for (std::size_t step = 0; step < kSteps; ++step)
    expected = compute(expected, Weights(model.data() + place_of(step) * kWeights, kWeights));

  const TempFolder folder;
  const auto path = folder.write<std::uint32_t>("model", model);
  flashpack::Engine engine;
  Run run(engine, path);
  const std::uint64_t result = run();
  std::printf("%zu of %zu steps were through before the last byte was there\n", run.steps_before_the_end(), kSteps);
  return result == expected ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "layer_by_layer: %s\n", error.what());
  return 1;
}

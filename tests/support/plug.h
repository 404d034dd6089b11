#pragma once

#include <future>

#include "flashpack/engine.h"

namespace flashpack::testing {

/// Holds an engine's driver thread, so that what is started meanwhile neither begins nor ends before pull().
class Plug {
 public:
  explicit Plug(Engine& engine) : transfer_(engine.start_load({}, &stopper_)) { stopper_.entered.get_future().wait(); }
  /// Pulls the plug.
  ~Plug() {
    if (!pulled_) pull();
  }
  Plug(const Plug&) = delete;
  Plug& operator=(const Plug&) = delete;

  void pull() {
    pulled_ = true;
    stopper_.leave.set_value();
  }

 private:
  struct Stopper final : Completion {
    void done(Transfer&) noexcept override {
      entered.set_value();
      leave.get_future().wait();
    }
    std::promise<void> entered;
    std::promise<void> leave;
  };

  Stopper stopper_;
  bool pulled_ = false;
  Transfer transfer_;
};

}  // namespace flashpack::testing

/// Modules that save and load themselves.
///
///   struct NetImpl : torch::nn::Module, flashpack::FlashPackMixin<NetImpl> { explicit NetImpl(int width); ... };
///
///   flashpack::Engine engine;
///   auto net = NetImpl::from_flashpack(engine, "net.flashpack", {}, /*width=*/384);
///
/// Thread safety: any thread may call, with one engine or several; a module belongs to one call at a time.
#pragma once

#include <filesystem>
#include <memory>
#include <utility>

#include "flashpack/torch.h"

namespace flashpack {

/// Base of `Derived`, which must also derive from torch::nn::Module.
template <class Derived>
class FlashPackMixin {
 public:
  /// pack_to_file() of this module.
  TransferStats save_flashpack(Engine& engine, const std::filesystem::path& path,
                               const PackOptions& options = {}) const {
    return pack_to_file(engine, static_cast<const Derived&>(*this), path, options);
  }

  /// A new module, made from `args` and assigned from the file, in evaluation mode. Throws: as assign_from_file().
  template <class... Args>
  static std::shared_ptr<Derived> from_flashpack(Engine& engine, const std::filesystem::path& path,
                                                 const AssignOptions& options = {}, Args&&... args) {
    auto module = std::make_shared<Derived>(std::forward<Args>(args)...);
    assign_from_file(engine, *module, path, options);
    module->eval();
    return module;
  }

 private:
  friend Derived;
  FlashPackMixin() = default;
};

}  // namespace flashpack

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <map>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "flashpack/checkpoint.h"
#include "flashpack/torch.h"
#include "torch_binding/libtorch/casts.h"
#include "torch_binding/libtorch/module_tensors.h"
#include "torch_binding/libtorch/tensors.h"

namespace flashpack {

namespace {

// One tensor of the module, with all of its names and the record of the file that it gets.
struct Target {
  at::Tensor tensor;
  bool is_parameter = false;
  std::vector<std::string> names;  // Names in the module; the first is reported.
  std::optional<std::size_t> record;

  std::string label() const { return (is_parameter ? "parameter '" : "buffer '") + names.front() + "'"; }
};

struct Match {
  std::vector<Target> targets;
  AssignReport report;
};

std::vector<Target> targets_of(const ::torch::nn::Module& module, const NameFilter& ignore) {
  std::vector<Target> targets;
  std::unordered_map<const void*, std::size_t> index_of;
  for (ModuleTensor& each : module_tensors(module)) {
    if (ignore.matches(each.name)) continue;
    const auto [found, is_new] = index_of.try_emplace(each.tensor.unsafeGetTensorImpl(), targets.size());
    if (is_new) targets.push_back({.tensor = std::move(each.tensor), .is_parameter = each.is_parameter});
    targets[found->second].names.push_back(std::move(each.name));
  }
  return targets;
}

Match match_names(const ::torch::nn::Module& module, const Checkpoint& checkpoint, const AssignOptions& options) {
  Match match{.targets = targets_of(module, options.ignore)};
  // Sorted, because the writer of the file might have chosen the names for their hashes.
  std::map<std::string_view, std::size_t> record_of;
  for (std::size_t i = 0; i < checkpoint.size(); ++i) record_of.emplace(checkpoint.record(i).name, i);
  for (Target& target : match.targets) {
    for (const std::string& name : target.names) {
      const auto found = record_of.find(name);
      if (found == record_of.end()) continue;
      if (!target.record) target.record = found->second;
      record_of.erase(found);
    }
    AssignReport& report = match.report;
    auto& names = target.record         ? report.assigned
                  : target.is_parameter ? report.missing_parameters
                                        : report.missing_buffers;
    names.push_back(target.names.front());
  }
  for (std::size_t i = 0; i < checkpoint.size(); ++i) {
    const std::string& name = checkpoint.record(i).name;
    if (record_of.contains(name) && !options.ignore.matches(name)) match.report.unexpected.push_back(name);
  }
  return match;
}

std::string listed(const std::vector<std::string>& names) {
  constexpr std::size_t kShown = 20;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kShown); ++i) text += (i > 0 ? ", '" : "'") + names[i] + "'";
  if (names.size() > kShown) text += ", and " + std::to_string(names.size() - kShown) + " more";
  return "[" + text + "]";
}

std::string name_of(at::ScalarType type) {
  const std::optional<DType> dtype = format_dtype(type);
  return dtype ? std::string(dtype_name(*dtype)) : c10::toString(type);
}

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& cause, Errc code = Errc::kMismatch) {
  throw Error(code, "assign " + path.string() + ": " + cause, path);
}

void check_names(const std::filesystem::path& path, const AssignReport& report, const AssignOptions& options) {
  const auto counted = [](const std::vector<std::string>& names, const char* what) {
    return std::to_string(names.size()) + " " + what;
  };
  if ((options.strict_params || options.strict_buffers) && !report.unexpected.empty()) {
    refuse(path, "Could not assign " + counted(report.unexpected, "names: ") + listed(report.unexpected));
  }
  std::vector<std::string> missing;
  std::string counts;
  if (options.strict_params && !report.missing_parameters.empty()) {
    missing = report.missing_parameters;
    counts = counted(missing, "parameters");
  }
  if (options.strict_buffers && !report.missing_buffers.empty()) {
    missing.insert(missing.end(), report.missing_buffers.begin(), report.missing_buffers.end());
    counts += (counts.empty() ? "" : " and ") + counted(report.missing_buffers, "buffers");
  }
  if (!missing.empty()) refuse(path, "Missing " + counts + ": " + listed(missing));
}

// Throws if the tensor cannot take the data of `record`, so that nothing can be refused after the load.
void check_fit(const std::filesystem::path& path, const Target& target, const TensorRecord& record, at::Device device,
               const AssignOptions& options) {
  const at::Tensor& tensor = target.tensor;
  if (!(tensor.is_cpu() || tensor.device() == device) || tensor.layout() != at::kStrided || tensor.is_quantized()) {
    refuse(path,
           target.label() + " is a " + tensor.toString() +
               "; only dense tensors on the CPU or the engine's device can be assigned",
           Errc::kInvalidArgument);
  }
  if (tensor.sizes() != at::IntArrayRef(record.shape)) {
    refuse(path, "shape mismatch for " + target.label() + ": model=" + c10::str(tensor.sizes()) +
                     " vs flash=" + c10::str(at::IntArrayRef(record.shape)));
  }
  const at::ScalarType type = scalar_type(record.dtype);
  if (options.coerce_dtype || type == tensor.scalar_type()) return;
  if (!target.is_parameter) {
    refuse(path, "dtype mismatch for " + target.label() + ": model=" + name_of(tensor.scalar_type()) +
                     " vs flash=" + name_of(type));
  }
  if (tensor.requires_grad() && !c10::isFloatingType(type) && !c10::isComplexType(type)) {
    refuse(path, target.label() + " requires grad, which " + name_of(type) + " in the file cannot");
  }
}

// Returns the tensors with the loaded data, in the targets' order; undefined for targets that the file lacks.
std::vector<at::Tensor> load(Engine& engine, const Checkpoint& checkpoint, Match& match, const AssignOptions& options) {
  std::vector<std::size_t> wanted;
  for (const Target& target : match.targets) {
    if (target.record) wanted.push_back(*target.record);
  }
  const LoadedRecords loaded(engine, checkpoint, wanted, options.cache, options.verify);
  match.report.stats = loaded.stats();
  std::vector<at::Tensor> tensors;
  std::size_t next = 0;
  for (const Target& target : match.targets) {
    // Only a module that was made in inference mode gets inference tensors.
    const c10::InferenceMode mode(target.tensor.is_inference());
    at::Tensor& tensor = tensors.emplace_back();
    if (target.record) tensor = loaded.tensor(next++);
    if (!target.record || !options.coerce_dtype) continue;
    const at::ScalarType type = target.tensor.scalar_type();
    std::optional<at::Tensor> cast = cast_exactly(tensor, type);
    if (!cast)
      refuse(checkpoint.path(), target.label() + " would lose values if it were cast from " +
                                    name_of(tensor.scalar_type()) + " to " + name_of(type));
    tensor = *std::move(cast);
  }
  return tensors;
}

// Throws nothing, because check_fit has refused all tensors that set_data could refuse.
void replace_data(const at::Tensor& tensor, const at::Tensor& loaded) {
  tensor.set_data(loaded);
  // backward() and optimizers expect a gradient to have its tensor's dtype, device and shape.
  const at::Tensor& grad = tensor.grad();
  if (!grad.defined()) return;
  if (grad.scalar_type() != loaded.scalar_type() || grad.device() != loaded.device() || grad.sizes() != loaded.sizes())
    tensor.mutable_grad().reset();
}

}  // namespace

AssignReport assign_from_file(Engine& engine, ::torch::nn::Module& module, const std::filesystem::path& path,
                              const AssignOptions& options) {
  const Checkpoint checkpoint = open_checkpoint(path);
  Match match = match_names(module, checkpoint, options);
  check_names(path, match.report, options);
  for (const Target& target : match.targets) {
    if (!target.record) continue;
    check_fit(path, target, checkpoint.record(*target.record), device_of(engine), options);
  }
  const std::vector<at::Tensor> loaded = load(engine, checkpoint, match, options);
  for (std::size_t i = 0; i < loaded.size(); ++i) {
    if (loaded[i].defined()) replace_data(match.targets[i].tensor, loaded[i]);
  }
  return std::move(match.report);
}

}  // namespace flashpack

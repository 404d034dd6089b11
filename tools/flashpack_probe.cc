// flashpack_probe shows what this machine and a path on it allow, and how to remove their limits.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include "engine/tuning/ignored_profiles.h"
#include "engine/tuning/profile_key.h"
#include "flashpack/probe.h"
#include "flashpack/tuning.h"

namespace {

using flashpack::Finding;

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;

constexpr const char* kDescription =
    "Tries what flashpack would use here and shows what it got: io_uring, registered buffers, huge pages, and with a "
    "PATH\n"
    "direct reads, how to ask the page cache, the profiles of flashpack_tune that loads to the host and to the GPUs "
    "can\n"
    "have, and why others for the same disk are ignored. Each limit comes with its cure.";

constexpr const char* kFooter =
    "Examples:\n"
    "  flashpack_probe /models/model.flashpack\n"
    "  flashpack_probe /models --json | jq 'to_entries[] | select(.value.limit != \"\")'\n"
    "\n"
    "Exit status: 0 it was tried (limits or not), 1 there is nothing at PATH, 2 wrong usage.";

using flashpack::Device;

Finding profile(const char* key, const std::filesystem::path& path, Device device) {
  const flashpack::TunedOptions tuned = flashpack::tuned_options(path, device);
  return {.key = key, .value = tuned.applied ? tuned.reason : "none applies: " + tuned.reason};
}

// The profiles of loads to the host and, where there are GPUs, to these, and those that no load has.
void add_profiles(std::vector<Finding>& findings, const std::filesystem::path& path) {
  constexpr Device kGpu{.kind = Device::Kind::kCuda};
  const std::string gpus = flashpack::internal::profile_key(path, kGpu).gpu;
  findings.push_back(profile("profile", path, {}));
  if (!gpus.empty()) {
    findings.push_back(profile("profile_gpu", path, kGpu));
    findings.back().value = gpus + ": " + findings.back().value;
  }
  std::string ignored;
  for (const std::string& each : flashpack::internal::ignored_profiles(path))
    ignored += (ignored.empty() ? "" : "; ") + each;
  if (!ignored.empty())
    findings.push_back(
        {.key = "profiles_ignored", .value = "in " + flashpack::profiles_path().string() + ": " + ignored});
}

void print_text(const std::vector<Finding>& findings) {
  std::size_t width = 0;
  for (const Finding& finding : findings) width = std::max(width, finding.key.size());
  const auto indent = static_cast<int>(width);
  for (const Finding& finding : findings) {
    std::printf("%-*s  %s\n", indent, finding.key.c_str(), finding.value.c_str());
    if (!finding.limit.empty()) std::printf("%-*s    limit: %s\n", indent, "", finding.limit.c_str());
    if (!finding.cure.empty()) std::printf("%-*s    cure:  %s\n", indent, "", finding.cure.c_str());
  }
  const auto limits = std::count_if(findings.begin(), findings.end(), [](const auto& f) { return !f.limit.empty(); });
  std::printf(limits == 0 ? "no limits\n" : limits == 1 ? "1 limit\n" : "%td limits\n", limits);
}

void print_json(const std::vector<Finding>& findings) {
  boost::json::object report;
  for (const Finding& finding : findings) {
    report[finding.key] = {{"value", finding.value}, {"limit", finding.limit}, {"cure", finding.cure}};
  }
  std::printf("%s\n", boost::json::serialize(report).c_str());
}

}  // namespace

int main(int argc, char** argv) try {
  CLI::App app(kDescription, "flashpack_probe");
  app.footer(kFooter);
  std::filesystem::path path;
  bool json = false;
  app.add_option("PATH", path, "A checkpoint, or the directory where checkpoints are");
  app.add_flag("--json", json, "One object: {KEY: {\"value\", \"limit\", \"cure\"}}");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  std::vector<Finding> findings = flashpack::probe(path);
  if (!path.empty()) add_profiles(findings, path);
  json ? print_json(findings) : print_text(findings);
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    throw std::system_error(errno, std::generic_category(), "write to the standard output");
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "flashpack_probe: %s\n", error.what());
  return kExitFailed;
}

/// The work of every benchmark program around its benchmarks.
#pragma once

#include <benchmark/benchmark.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <optional>
#include <string>
#include <vector>

namespace flashpack::bench {

/// Registers `bench`, a function of the state that measures by itself, for so many iterations. An exception of it ends
/// that benchmark alone, and its message is shown.
template <class Bench>
void add_rounds(const std::string& name, int rounds, Bench bench) {
  const auto run = [bench](benchmark::State& state) {
    try {
      bench(state);
    } catch (const std::exception& error) {
      state.SkipWithError(error.what());
    }
  };
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Iterations(rounds)->Unit(benchmark::kMillisecond);
}

/// Reads the options of `app`, and leaves the others to Google Benchmark. The exit status, where the program is to end.
inline std::optional<int> read_command_line(CLI::App& app, int argc, char** argv) {
  app.allow_extras();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  std::vector<std::string> rest = app.remaining();
  std::vector<char*> rest_argv{argv[0]};  // Google Benchmark keeps this one.
  for (std::string& argument : rest) rest_argv.push_back(argument.data());
  int rest_argc = static_cast<int>(rest_argv.size());
  benchmark::Initialize(&rest_argc, rest_argv.data());
  return benchmark::ReportUnrecognizedArguments(rest_argc, rest_argv.data()) ? std::optional(2) : std::nullopt;
}

}  // namespace flashpack::bench

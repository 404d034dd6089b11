/// Shared by the benchmark programs: they register benchmarks and read the command line with it.
#pragma once

#include <benchmark/benchmark.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "bench/support/measure.h"

namespace flashpack::bench {

/// Registers `bench`, which measures its time itself, for `rounds` iterations. An exception ends only that benchmark
/// and is shown.
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

/// Shows the median of a figure, and its least and greatest value, under names that begin with `prefix`.
inline void show(benchmark::State& state, const std::string& prefix, const std::string& unit, const Summary& figure) {
  state.counters[prefix + unit] = figure.median;
  state.counters[prefix + "min_" + unit] = figure.min;
  state.counters[prefix + "max_" + unit] = figure.max;
}

/// Reads the options of `app`, and passes the others to Google Benchmark. Returns the exit status if the program is to
/// end.
inline std::optional<int> read_command_line(CLI::App& app, int argc, char** argv) {
  app.allow_extras();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  std::vector<std::string> rest = app.remaining();
  std::vector<char*> rest_argv{argv[0]};  // Google Benchmark keeps a pointer to argv[0].
  for (std::string& argument : rest) rest_argv.push_back(argument.data());
  int rest_argc = static_cast<int>(rest_argv.size());
  benchmark::Initialize(&rest_argc, rest_argv.data());
  return benchmark::ReportUnrecognizedArguments(rest_argc, rest_argv.data()) ? std::optional(2) : std::nullopt;
}

}  // namespace flashpack::bench

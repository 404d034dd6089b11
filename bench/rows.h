/// Further rows of engine_bench. Each function registers some; `setup` is borrowed until they have run.
#pragma once

#include "bench/turns.h"

namespace flashpack::bench {

/// Loads of many small tensors, of many files, and of small reads at random places.
void register_scattered_rows(const Setup& setup, int rounds);

/// Many loads at once through each way to wait for them: Transfer, Completion, EventQueue, Asio and co_await.
void register_completion_rows(const Setup& setup, int rounds);

/// These rows measure the work before bytes move: opening checkpoints of many tensors, and planning loads of them.
void register_metadata_rows(const Setup& setup, int rounds);

/// The engine's own limit: its pipeline over queues that complete everything at once.
void register_pipeline_rows(const Setup& setup, int rounds);

/// These rows measure what this machine takes for single things, such as a wake or a read over a gap. The engine weighs
/// them against each other, and its constants rest on them.
void register_cost_rows(const Setup& setup, int rounds);

}  // namespace flashpack::bench

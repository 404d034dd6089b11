/// Reads parts of tensors, such as the rows or columns that one of several GPUs has.
///
///   const flashpack::TensorRecord& weight = checkpoint.record(i);  // float32 [4096, 4096]
///   const std::array<flashpack::IndexRange, 2> columns{{{0, 4096}, {1024, 2048}}};
///   file.extents = flashpack::slice_extents(weight, columns, target);  // 4096 * 1024 floats
///
/// Thread safety: any thread may call the function.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "flashpack/engine.h"
#include "flashpack/format.h"

namespace flashpack {

/// The indices of one dim from `begin` on, up to, but without, `end`.
struct IndexRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// Returns the extents, in file order, that read the elements whose indices are in `ranges`, of which there is one for
/// each dim. They fill `target`, in C order and without gaps, with the product of the ranges' lengths times
/// element_bytes(record.dtype) bytes. Bytes that are neighbours in the file are one extent: whole inner dims, together
/// with a range of the dim before them. An empty slice has no extents.
///
/// An inner dim of which a part is wanted makes an extent for each of its rows, which takes some hundred bytes of
/// memory while it is read. Rows that are less than 64 KiB apart are read together, with the bytes between, and copied.
/// If they are less than 1 KiB apart, or go to a GPU, it costs less to load whole rows and to copy the slice. Throws:
/// Error (kInvalidArgument) if `ranges` do not fit the shape.
std::vector<Extent> slice_extents(const TensorRecord& record, std::span<const IndexRange> ranges, void* target);

}  // namespace flashpack

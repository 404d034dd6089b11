/// Checkpoints in the C API: which tensors files have, and where. flashpack.h includes this header, and has the rules:
/// any thread may call.
///
/// flashpack_checkpoint_open() and flashpack_checkpoint_open_files() open a checkpoint, and
/// flashpack_checkpoint_destroy() ends it; the other functions ask.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "flashpack/flashpack_status.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/// The tensors of one or several files, in flashpack or safetensors format. Constant. The files stay open, and loads
/// read from them, whatever is at their paths by then; FLASHPACK_FILE_CHANGED if they were changed in place.
typedef struct flashpack_checkpoint flashpack_checkpoint;

/// Types of elements. Values stay as they are in later versions, which may have more. FLOAT4_E2M1FN_X2 has two 4-bit
/// floats in a byte, and a dim counts bytes.
// clang-format off
enum {
  FLASHPACK_DTYPE_BOOL = 0, FLASHPACK_DTYPE_INT8 = 1, FLASHPACK_DTYPE_UINT8 = 2, FLASHPACK_DTYPE_INT16 = 3,
  FLASHPACK_DTYPE_UINT16 = 4, FLASHPACK_DTYPE_INT32 = 5, FLASHPACK_DTYPE_UINT32 = 6, FLASHPACK_DTYPE_INT64 = 7,
  FLASHPACK_DTYPE_UINT64 = 8, FLASHPACK_DTYPE_FLOAT16 = 9, FLASHPACK_DTYPE_BFLOAT16 = 10,
  FLASHPACK_DTYPE_FLOAT32 = 11, FLASHPACK_DTYPE_FLOAT64 = 12, FLASHPACK_DTYPE_COMPLEX32 = 13,
  FLASHPACK_DTYPE_COMPLEX64 = 14, FLASHPACK_DTYPE_COMPLEX128 = 15, FLASHPACK_DTYPE_FLOAT8_E4M3FN = 16,
  FLASHPACK_DTYPE_FLOAT8_E4M3FNUZ = 17, FLASHPACK_DTYPE_FLOAT8_E5M2 = 18, FLASHPACK_DTYPE_FLOAT8_E5M2FNUZ = 19,
  FLASHPACK_DTYPE_FLOAT8_E8M0FNU = 20, FLASHPACK_DTYPE_FLOAT4_E2M1FN_X2 = 21
};
// clang-format on

typedef struct flashpack_checkpoint_info {
  size_t struct_size;
  size_t file_count;
  size_t tensor_count;
  size_t metadata_count;  ///< Entries of text that the authors of the files have put in.
} flashpack_checkpoint_info;

/// One file of a checkpoint. Pointers live as long as the checkpoint.
typedef struct flashpack_file {
  size_t struct_size;
  const char* path;
  const char* format;      ///< "flashpack" or "safetensors".
  uint64_t size_bytes;     ///< The whole file.
  uint64_t payload_bytes;  ///< Where the payload ends.
  int32_t fd;              ///< Open for reading, and owned by the checkpoint.
  int32_t has_checksums;   ///< 1 or 0.
} flashpack_file;

/// One tensor of a checkpoint. Pointers live as long as the checkpoint.
typedef struct flashpack_tensor {
  size_t struct_size;
  const char* name;  ///< UTF-8, unique in the checkpoint; may hold zero bytes.
  size_t name_bytes;
  const char* dtype_name;  ///< As torch has it, without "torch.": "bfloat16".
  int32_t dtype;           ///< FLASHPACK_DTYPE_*.
  uint32_t element_bytes;
  const int64_t* shape;   ///< `dims` numbers of elements; never NULL.
  size_t dims;            ///< 0 for a tensor of one element.
  size_t file;            ///< Index of its file.
  uint64_t offset_bytes;  ///< In that file.
  uint64_t size_bytes;
} flashpack_tensor;

/// An entry of text. Pointers live as long as the checkpoint; both texts may hold zero bytes.
typedef struct flashpack_metadata {
  size_t struct_size;
  const char* key;
  size_t key_bytes;
  const char* value;
  size_t value_bytes;
} flashpack_metadata;

/// Opens a flashpack file, a safetensors file, an index of several of either (`*.index.json`), or a directory, of which
/// the usual name of a model's weights is taken (model.flashpack, model.safetensors, ...) or else the only such index
/// or file; a safetensors one does not count there if a flashpack one of the same name is beside it. Any bytes are
/// taken for possibly hostile. Errors: FLASHPACK_BAD_FILE, whose message names the broken rule; FLASHPACK_FILE_CHANGED;
/// errno.
flashpack_status flashpack_checkpoint_open(const char* path, flashpack_checkpoint** checkpoint,
                                           flashpack_error** error);
/// Opens several files as one checkpoint. Errors: as above, and FLASHPACK_BAD_FILE if two of them have one tensor.
flashpack_status flashpack_checkpoint_open_files(const char* const* paths, size_t path_count,
                                                 flashpack_checkpoint** checkpoint, flashpack_error** error);
/// How much there is to ask for with the functions that follow.
flashpack_status flashpack_checkpoint_get_info(const flashpack_checkpoint* checkpoint, flashpack_checkpoint_info* info,
                                               flashpack_error** error);
/// File `index` of the checkpoint. An index that is too large is FLASHPACK_INVALID_ARGUMENT, here and below.
flashpack_status flashpack_checkpoint_get_file(const flashpack_checkpoint* checkpoint, size_t index,
                                               flashpack_file* file, flashpack_error** error);
/// Tensor `index` of the checkpoint. Tensors are counted file by file, and in file order in each.
flashpack_status flashpack_checkpoint_get_tensor(const flashpack_checkpoint* checkpoint, size_t index,
                                                 flashpack_tensor* tensor, flashpack_error** error);
/// Entry `index` of the text, sorted by key.
flashpack_status flashpack_checkpoint_get_metadata(const flashpack_checkpoint* checkpoint, size_t index,
                                                   flashpack_metadata* metadata, flashpack_error** error);
/// Finds a tensor by its name of `name_bytes` bytes. Errors: FLASHPACK_NOT_FOUND.
flashpack_status flashpack_checkpoint_find(const flashpack_checkpoint* checkpoint, const char* name, size_t name_bytes,
                                           size_t* index, flashpack_error** error);
/// Loads that are under way keep what they need.
void flashpack_checkpoint_destroy(flashpack_checkpoint* checkpoint);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

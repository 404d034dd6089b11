/* What somebody else's program does first: load a file through the C API. In C89 but for the header. */
#include <flashpack/flashpack.h>
#include <stdio.h>

int main(int argc, char** argv) {
  flashpack_engine* engine = NULL;
  flashpack_checkpoint* checkpoint = NULL;
  flashpack_tensors* tensors = NULL;
  flashpack_error* error = NULL;
  flashpack_load_request request = {sizeof(flashpack_load_request)};
  flashpack_file file = {sizeof(flashpack_file)};
  if (flashpack_engine_create(NULL, &engine, &error) ||
      flashpack_checkpoint_open(argc > 1 ? argv[1] : "no-such.flashpack", &checkpoint, &error) ||
      flashpack_checkpoint_get_file(checkpoint, 0, &file, &error) ||
      (request.checkpoint = checkpoint, flashpack_load_all(engine, &request, &tensors, &error))) {
    printf("%s\n", flashpack_error_message(error));
    flashpack_error_destroy(error);
    return 1;
  }
  printf("loaded %lu bytes\n", (unsigned long)file.payload_bytes);
  flashpack_tensors_destroy(tensors);
  flashpack_checkpoint_destroy(checkpoint);
  flashpack_engine_destroy(engine);
  return 0;
}

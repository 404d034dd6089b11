#include "flashpack/transfer.h"

flashpack::Transfer second_handle(flashpack::Transfer& transfer) {
#ifdef MISUSE
  return transfer;
#else
  return std::move(transfer);
#endif
}

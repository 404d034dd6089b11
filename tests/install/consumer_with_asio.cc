// A program that has Boost in a namespace of its own, and Asio compiled once and without what is deprecated.
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/impl/src.hpp>
#include <boost/asio/io_context.hpp>
#include <cstdio>
#include <vector>

#include "flashpack/async.h"
#include "flashpack/format.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  flashpack::Engine engine;
  const auto metadata = flashpack::read_metadata(argv[1]);
  std::vector<std::byte> payload(metadata.payload_bytes);
  flashpack::LoadRequest request{
      .files = {{.path = argv[1], .extents = {{.size_bytes = payload.size(), .target = payload.data()}}}}};
  consumer_boost::asio::io_context context;
  flashpack::async_load(engine, std::move(request),
                        consumer_boost::asio::bind_executor(context, [](std::exception_ptr error, auto stats) {
                          if (!error)
                            std::printf("loaded %zu bytes\n", static_cast<std::size_t>(stats.requested_bytes));
                        }));
  context.run();
}

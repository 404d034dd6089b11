// A program that compiles Boost.JSON for itself and awaits loads.
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/json/src.hpp>
#include <cstdio>

#include "flashpack/async.h"
#include "flashpack/format.h"

namespace {

boost::asio::awaitable<void> load(flashpack::Engine& engine, flashpack::LoadRequest request) {
  const auto stats = co_await flashpack::async_load(engine, std::move(request), boost::asio::use_awaitable);
  std::printf("loaded %zu bytes\n", static_cast<std::size_t>(stats.requested_bytes));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  flashpack::Engine engine;
  const auto metadata = flashpack::read_metadata(argv[1]);
  std::vector<std::byte> payload(metadata.payload_bytes);
  flashpack::LoadRequest request{
      .files = {{.path = argv[1], .extents = {{.size_bytes = payload.size(), .target = payload.data()}}}}};
  boost::asio::io_context context;
  boost::asio::co_spawn(context, load(engine, std::move(request)), boost::asio::detached);
  context.run();
  return boost::json::parse("[1, 2]").as_array().size() == 2 ? 0 : 1;
}

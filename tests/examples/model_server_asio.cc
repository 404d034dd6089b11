// A server that answers from one model while it loads the next one, on one engine and one thread.
//
// A request is a number, and its answer is made of the weights of the current model. One number asks for the next
// model: a coroutine of its own loads it, with a time limit, and makes it the current one. A request keeps the model
// that it has begun with, whose memory goes when the last such request is through. Exits with 0 if every model that a
// client asked for came, and each answer until then was one of the model before.
#include <flashpack/async.h>
#include <flashpack/engine.h>
#include <flashpack/host_memory.h>

#include <array>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/examples/temp_folder.h"

namespace {

namespace asio = boost::asio;
using asio::use_awaitable;
using asio::ip::tcp;

constexpr std::size_t kWeights = std::size_t{4} << 20;  // 32 MiB.
constexpr std::uint64_t kSwaps = 6;
constexpr std::uint64_t kNextModel = ~std::uint64_t{0};  // Asks for it.

/// Weights in memory whose pages serve the next model, too.
struct Model {
  static constexpr std::size_t kBytes = kWeights * sizeof(std::uint64_t);
  explicit Model(const flashpack::Engine& engine) : memory(engine.options().memory_pool, kBytes) {}
  const std::uint64_t* weights() const { return reinterpret_cast<const std::uint64_t*>(memory.data()); }
  flashpack::HostMemory memory;
};

void rethrow(const std::exception_ptr& error) {
  if (error) std::rethrow_exception(error);
}

asio::awaitable<std::shared_ptr<const Model>> load(flashpack::Engine& engine, std::filesystem::path path) {
  auto model = std::make_shared<Model>(engine);
  flashpack::LoadRequest request;
  request.files.push_back({.path = std::move(path)});
  request.files[0].extents = {{.size_bytes = Model::kBytes, .target = model->memory.data()}};
  request.deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  co_await flashpack::async_load(engine, std::move(request), use_awaitable);
  co_return model;
}

class Server {
 public:
  Server(asio::io_context& context, flashpack::Engine& engine, std::array<std::filesystem::path, 2> models)
      : acceptor_(context, tcp::endpoint(asio::ip::address_v4::loopback(), 0)),
        engine_(engine),
        models_(std::move(models)) {}

  tcp::endpoint endpoint() const { return acceptor_.local_endpoint(); }

  // Serves one client until it hangs up.
  asio::awaitable<void> serve() {
    tcp::socket socket = co_await acceptor_.async_accept(use_awaitable);
    for (std::uint64_t asked = 0;;) {
      boost::system::error_code error;
      co_await asio::async_read(socket, asio::buffer(&asked, sizeof asked), asio::redirect_error(use_awaitable, error));
      if (error == asio::error::eof) co_return;
      if (error) throw boost::system::system_error(error);
      if (asked == kNextModel) asio::co_spawn(acceptor_.get_executor(), swap_models(), rethrow);
      // It holds the model until the answer has been sent, whatever becomes current meanwhile.
      const std::shared_ptr<const Model> model = current_;
      const std::uint64_t answer = model ? model->weights()[asked % kWeights] : 0;
      co_await asio::async_write(socket, asio::buffer(&answer, sizeof answer), use_awaitable);
    }
  }

 private:
  // If it throws, the current model stays. This program ends then; another would log it and go on.
  asio::awaitable<void> swap_models() {
    current_ = co_await load(engine_, models_[next_]);
    next_ = 1 - next_;
  }

  tcp::acceptor acceptor_;
  flashpack::Engine& engine_;
  std::array<std::filesystem::path, 2> models_;
  std::size_t next_ = 0;
  std::shared_ptr<const Model> current_;
};

asio::awaitable<std::uint64_t> ask(tcp::socket& socket, std::uint64_t asked) {
  std::uint64_t answer = 0;
  co_await asio::async_write(socket, asio::buffer(&asked, sizeof asked), use_awaitable);
  co_await asio::async_read(socket, asio::buffer(&answer, sizeof answer), use_awaitable);
  co_return answer;
}

// Asks for one model after the other and, until it is there, for answers, which it counts.
asio::awaitable<void> be_client(tcp::endpoint server, asio::any_io_executor executor, std::uint64_t& answers) {
  tcp::socket socket(executor);
  co_await socket.async_connect(server, use_awaitable);
  std::uint64_t before = 0;
  for (std::uint64_t swap = 0; swap < kSwaps; ++swap) {
    const std::uint64_t expected = swap % 2 + 1;
    std::uint64_t answer = co_await ask(socket, kNextModel);
    for (; answer == before; ++answers) answer = co_await ask(socket, answers * 4099);
    if (answer != expected) throw std::runtime_error("a wrong answer");
    before = expected;
  }
}

}  // namespace

int main() try {
  const TempFolder folder;
  std::array<std::filesystem::path, 2> models;
  for (std::uint64_t number : {1u, 2u}) {
    const std::vector<std::uint64_t> weights(kWeights, number);
    models[number - 1] = folder.write<std::uint64_t>("model" + std::to_string(number), weights);
  }
  flashpack::Engine engine;
  asio::io_context context(1);
  Server server(context, engine, models);
  std::uint64_t answers = 0;
  asio::co_spawn(context, server.serve(), rethrow);
  asio::co_spawn(context, be_client(server.endpoint(), context.get_executor(), answers), rethrow);
  context.run();
  std::printf("%zu answers while %zu models were loaded\n", std::size_t{answers}, std::size_t{kSwaps});
} catch (const std::exception& error) {
  std::fprintf(stderr, "model_server_asio: %s\n", error.what());
  return 1;
}

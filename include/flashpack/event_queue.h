/// A descriptor that event loops of any kind can poll: epoll, libuv, GLib, io_uring.
///
///   flashpack::EventQueue queue;
///   epoll_event readable{.events = EPOLLIN, .data = {.fd = queue.fd()}};
///   epoll_ctl(loop, EPOLL_CTL_ADD, queue.fd(), &readable);
///   flashpack::Transfer load = queue.start_load(engine, request, 7);
///   ...
///   std::array<flashpack::Event, 64> events;  // When the loop says that queue.fd() is readable.
///   for (const flashpack::Event& event : std::span(events).first(queue.take(events))) {
///     if (event.kind == flashpack::Event::Kind::kLanded) use(event.file, event.extent);
///     if (event.kind == flashpack::Event::Kind::kDone) ended(event.tag, event.error);
///   }
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <system_error>

#include "flashpack/engine.h"

namespace flashpack {

/// Something that has happened to a transfer.
struct Event {
  enum class Kind : std::uint8_t {
    kLanded,  ///< An extent has landed, as in Completion::landed(). Only for loads with LoadRequest::report_extents.
    kDone,    ///< The transfer has finished, successfully or not: wait() returns or throws at once. Its last event.
  };
  Kind kind = Kind::kDone;
  std::uint64_t tag = 0;   ///< The number that the transfer was started with.
  std::size_t file = 0;    ///< Index in LoadRequest::files. Only of kLanded.
  std::size_t extent = 0;  ///< Index in FileExtents::extents. Only of kLanded.
  std::error_code error;   ///< As Transfer::error(), empty after success. Only of kDone.
};

/// Collects the events of transfers that are started through it, of any number of engines.
///
/// Thread safety: any thread may call any member at any time, but moves and destruction need the queue to themselves.
/// It may be destroyed while transfers are under way. They go on, and their events are lost.
///
/// In a forked child, the copy of the queue starts nothing (Errc::kUnusable), take() returns 0, and the destructor
/// releases nothing; the parent loses no event.
class EventQueue {
 public:
  /// Takes one descriptor. Throws: Error (errno of eventfd).
  EventQueue();
  static std::optional<EventQueue> make(std::error_code& error) noexcept;
  EventQueue(EventQueue&&) noexcept = default;
  EventQueue& operator=(EventQueue&&) noexcept;
  ~EventQueue();

  /// A descriptor that is readable as long as an event waits. A loop that polls by edges gets one whenever the first
  /// event comes to an empty queue, and none for the events after it. The descriptor belongs to the queue. Callers only
  /// poll it, and neither read nor close it.
  int fd() const noexcept;

  /// Moves the oldest events to the beginning of `events` and returns their number, 0 if none waits. A loop that is
  /// told of edges alone calls it until it returns less than `events.size()`. It never waits for an event.
  std::size_t take(std::span<Event> events) noexcept;

  /// Engine::start_load(), whose events come with `tag`, which need not be unique. The transfer may be detached; the
  /// caller's memory must then live until kDone has been taken. Throws: Error, as Engine::start_load(), and then there
  /// is no event.
  Transfer start_load(Engine& engine, LoadRequest request, std::uint64_t tag);
  /// The transfer is not valid() after an error.
  Transfer start_load(Engine& engine, LoadRequest request, std::uint64_t tag, std::error_code& error) noexcept;

  /// FileWriter::start_write(), in the same way.
  Transfer start_write(FileWriter& writer, WriteRequest request, std::uint64_t tag);
  Transfer start_write(FileWriter& writer, WriteRequest request, std::uint64_t tag, std::error_code& error) noexcept;

 private:
  class Shared;
  class Listener;
  template <class Start>
  Transfer start(std::uint64_t tag, Start start_transfer);

  std::shared_ptr<Shared> shared_;  // Shared with the transfers that are under way. Null after a move.
};

}  // namespace flashpack

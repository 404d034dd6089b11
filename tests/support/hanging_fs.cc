// A FUSE file system in memory, of one directory, that keeps the requests it is told to hold without an answer.
//
// usage: hanging_fs CONTROL_FD MOUNTPOINT
//
// CONTROL_FD is a SOCK_SEQPACKET socket. Its other end is told "mounted" once, and then "held OP NAME" for each request
// that has arrived and is held. It may say "hold OP NAME", "release OP NAME" and "release", which is of everything, and
// is told "done" when that is so. OP is the name of an operation below; NAME may be "*", which is any file whose own
// name was not given, and which is told as "*". At the end of the socket the program ends, and the kernel fails what
// was held.
#define FUSE_USE_VERSION 31
#include <fuse3/fuse_lowlevel.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

struct Node {
  std::string name;
  mode_t mode = S_IFREG | 0644;
  std::vector<char> bytes;
  timespec changed{};
};

using Hold = std::pair<std::string, std::string>;  // Of which operation, on the file of which name.

struct HeldRequest {
  Hold hold;
  std::function<void()> answer;
};

int control_fd = -1;
std::deque<Node> nodes;  // Node i is inode i + 2; they stay, for whoever has them open.
std::map<std::string, fuse_ino_t> names;
std::set<Hold> holds;
std::vector<HeldRequest> held;

void say(const std::string& text) {
  if (::send(control_fd, text.data(), text.size(), MSG_NOSIGNAL) < 0) std::exit(0);
}

// Answers a request now, or when it is released.
void serve(const char* op, const std::string& name, std::function<void()> answer) {
  auto hold = holds.find({op, name});
  if (hold == holds.end()) hold = holds.find({op, "*"});
  if (hold == holds.end()) return answer();
  held.push_back({*hold, std::move(answer)});
  say("held " + hold->first + " " + hold->second);
}

void release(const std::function<bool(const Hold&)>& wanted) {
  std::erase_if(holds, wanted);
  std::vector<HeldRequest> rest;
  for (HeldRequest& request : std::exchange(held, {})) {
    if (wanted(request.hold)) {
      request.answer();
    } else {
      rest.push_back(std::move(request));
    }
  }
  held = std::move(rest);
}

void obey(const std::string& command) {
  std::istringstream words(command);
  std::string verb;
  Hold hold;
  words >> verb >> hold.first >> hold.second;
  if (verb == "hold") {
    holds.insert(hold);
  } else {
    release([&](const Hold& other) { return hold.first.empty() || hold == other; });
  }
  say("done");
}

Node& node_of(fuse_ino_t inode) { return nodes.at(inode - 2); }

std::string name_of(fuse_ino_t inode) { return inode == FUSE_ROOT_ID ? "." : node_of(inode).name; }

struct stat status_of(fuse_ino_t inode) {
  struct stat status{};
  status.st_ino = inode;
  status.st_nlink = 1;
  status.st_mode = S_IFDIR | 0755;
  if (inode == FUSE_ROOT_ID) return status;
  const Node& node = node_of(inode);
  status.st_mode = node.mode;
  status.st_size = static_cast<off_t>(node.bytes.size());
  status.st_mtim = status.st_ctim = node.changed;
  return status;
}

// Known for no time at all, so that each question comes here.
fuse_entry_param entry_of(fuse_ino_t inode) {
  fuse_entry_param entry{};
  entry.ino = inode;
  entry.attr = status_of(inode);
  return entry;
}

void resize(Node& node, std::size_t size_bytes) {
  node.bytes.resize(size_bytes);
  ::clock_gettime(CLOCK_REALTIME, &node.changed);
}

void on_init(void*, fuse_conn_info* connection) { connection->max_background = 1024; }

void on_lookup(fuse_req_t request, fuse_ino_t, const char* name) {
  serve("lookup", name, [=, name = std::string(name)] {
    const auto found = names.find(name);
    if (found == names.end()) {
      fuse_reply_err(request, ENOENT);
    } else {
      const fuse_entry_param entry = entry_of(found->second);
      fuse_reply_entry(request, &entry);
    }
  });
}

void on_getattr(fuse_req_t request, fuse_ino_t inode, fuse_file_info*) {
  serve("getattr", name_of(inode), [=] {
    const struct stat status = status_of(inode);
    fuse_reply_attr(request, &status, 0);
  });
}

void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat* wanted, int what, fuse_file_info*) {
  serve("setattr", name_of(inode), [=, wanted = *wanted] {
    if (what & FUSE_SET_ATTR_SIZE) resize(node_of(inode), static_cast<std::size_t>(wanted.st_size));
    if (what & FUSE_SET_ATTR_MODE) node_of(inode).mode = wanted.st_mode;
    const struct stat status = status_of(inode);
    fuse_reply_attr(request, &status, 0);
  });
}

void on_open(fuse_req_t request, fuse_ino_t inode, fuse_file_info* info) {
  serve("open", name_of(inode), [=, info = *info]() mutable {
    info.direct_io = 1;  // Every read and write comes here, as it was asked.
    fuse_reply_open(request, &info);
  });
}

void on_create(fuse_req_t request, fuse_ino_t, const char* name, mode_t mode, fuse_file_info* info) {
  serve("create", name, [=, name = std::string(name), info = *info]() mutable {
    resize(nodes.emplace_back(Node{.name = name, .mode = mode, .bytes = {}}), 0);
    names[name] = nodes.size() + 1;
    info.direct_io = 1;
    const fuse_entry_param entry = entry_of(names[name]);
    fuse_reply_create(request, &entry, &info);
  });
}

void on_read(fuse_req_t request, fuse_ino_t inode, std::size_t size, off_t at, fuse_file_info*) {
  serve("read", name_of(inode), [=] {
    const std::vector<char>& bytes = node_of(inode).bytes;
    const std::size_t begin = std::min(static_cast<std::size_t>(at), bytes.size());
    fuse_reply_buf(request, bytes.data() + begin, std::min(size, bytes.size() - begin));
  });
}

void on_write(fuse_req_t request, fuse_ino_t inode, const char* data, std::size_t size, off_t at, fuse_file_info*) {
  serve("write", name_of(inode), [=, data = std::vector<char>(data, data + size)] {
    Node& node = node_of(inode);
    resize(node, std::max(node.bytes.size(), static_cast<std::size_t>(at) + size));
    std::copy(data.begin(), data.end(), node.bytes.begin() + at);
    fuse_reply_write(request, size);
  });
}

void on_fallocate(fuse_req_t request, fuse_ino_t inode, int, off_t at, off_t size, fuse_file_info*) {
  serve("fallocate", name_of(inode), [=] {
    Node& node = node_of(inode);
    resize(node, std::max(node.bytes.size(), static_cast<std::size_t>(at + size)));
    fuse_reply_err(request, 0);
  });
}

void on_flush(fuse_req_t request, fuse_ino_t inode, fuse_file_info*) {
  serve("flush", name_of(inode), [=] { fuse_reply_err(request, 0); });
}

void on_release(fuse_req_t request, fuse_ino_t inode, fuse_file_info*) {
  serve("release", name_of(inode), [=] { fuse_reply_err(request, 0); });
}

void on_fsync(fuse_req_t request, fuse_ino_t inode, int, fuse_file_info*) {
  serve("fsync", name_of(inode), [=] { fuse_reply_err(request, 0); });
}

void on_unlink(fuse_req_t request, fuse_ino_t, const char* name) {
  serve("unlink", name, [=, name = std::string(name)] { fuse_reply_err(request, names.erase(name) ? 0 : ENOENT); });
}

void on_rename(fuse_req_t request, fuse_ino_t, const char* from, fuse_ino_t, const char* to, unsigned flags) {
  serve("rename", to, [=, from = std::string(from), to = std::string(to)] {
    const auto found = names.find(from);
    if (flags != 0 || found == names.end()) {
      fuse_reply_err(request, flags != 0 ? EINVAL : ENOENT);
      return;
    }
    names[to] = found->second;
    node_of(found->second).name = to;
    names.erase(from);
    fuse_reply_err(request, 0);
  });
}

void on_readdir(fuse_req_t request, fuse_ino_t, std::size_t size, off_t at, fuse_file_info*) {
  std::vector<char> entries(size);
  std::size_t used = 0;
  off_t position = 0;
  for (const auto& [name, inode] : names) {
    if (position++ < at) continue;
    const struct stat status = status_of(inode);
    const std::size_t wanted =
        fuse_add_direntry(request, entries.data() + used, size - used, name.c_str(), &status, position);
    if (wanted > size - used) break;
    used += wanted;
  }
  fuse_reply_buf(request, entries.data(), used);
}

// Both ends in one thread: a held request costs nothing but its memory, however many there are.
int run(fuse_session* session) {
  std::array<pollfd, 2> ends = {pollfd{.fd = control_fd, .events = POLLIN, .revents = 0},
                                pollfd{.fd = fuse_session_fd(session), .events = POLLIN, .revents = 0}};
  fuse_buf request{};
  while (!fuse_session_exited(session)) {
    if (::poll(ends.data(), ends.size(), -1) < 0 && errno != EINTR) return 1;
    if (ends[0].revents != 0) {
      std::array<char, 512> command{};
      const auto size = ::recv(control_fd, command.data(), command.size(), 0);
      if (size <= 0) return 0;
      obey(std::string(command.data(), static_cast<std::size_t>(size)));
    }
    if (ends[1].revents != 0) {
      const int got = fuse_session_receive_buf(session, &request);
      if (got > 0) fuse_session_process_buf(session, &request);
      if (got <= 0 && got != -EINTR && got != -EAGAIN) return 0;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  control_fd = std::atoi(argv[1]);
  fuse_lowlevel_ops operations{};
  operations.init = on_init;
  operations.lookup = on_lookup;
  operations.getattr = on_getattr;
  operations.setattr = on_setattr;
  operations.open = on_open;
  operations.create = on_create;
  operations.read = on_read;
  operations.write = on_write;
  operations.fallocate = on_fallocate;
  operations.flush = on_flush;
  operations.release = on_release;
  operations.fsync = on_fsync;
  operations.unlink = on_unlink;
  operations.rename = on_rename;
  operations.readdir = on_readdir;
  std::array<char*, 1> arguments = {argv[0]};
  fuse_args args = FUSE_ARGS_INIT(static_cast<int>(arguments.size()), arguments.data());
  fuse_session* session = fuse_session_new(&args, &operations, sizeof operations, nullptr);
  if (!session || fuse_session_mount(session, argv[2]) != 0) return 1;
  say("mounted");
  const int status = run(session);
  fuse_session_unmount(session);
  fuse_session_destroy(session);
  return status;
}

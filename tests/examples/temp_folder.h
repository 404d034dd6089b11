#pragma once

#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>

/// A folder for the files of an example, which goes with it. On /var/tmp, which unlike /tmp is a disk on most machines.
class TempFolder {
 public:
  TempFolder() {
    std::string name = "/var/tmp/flashpack-example-XXXXXX";
    if (!::mkdtemp(name.data())) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  /// Writes a file and returns its path.
  template <class T>
  std::filesystem::path write(const std::string& name, std::span<const T> values) const {
    std::ofstream out(path_ / name, std::ios::binary);
    out.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size_bytes()));
    if (!out.flush()) throw std::runtime_error("write " + name);
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

// Memory that is brought near before it is needed: lines, listed once a step, fetched during products.
//
// A product of some tokens is bound by computing, and memory idles beside it. What the stages after it read in
// pieces too short for the processor to foresee is fetched then: adapters' rank rows, and the KV of rows.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace quickchange {

constexpr int kLine = 64;  // bytes
constexpr int kPieceShift = 4;  // sixteen lines in a row, where what is listed is long

// Lines in pieces of `1 << shift` in a row; a piece begins at `base` + 64 * its place.
struct Lines {
  const char* base = nullptr;
  const std::uint32_t* places = nullptr;
  int count = 0;
  int shift = 0;

  void fetch(int line) const {
    const std::size_t place = places[line >> shift] + static_cast<std::size_t>(line & ((1 << shift) - 1));
    _mm_prefetch(base + place * kLine, _MM_HINT_T1);
  }
};

// A few lists of lines, fetched one behind the other, some lines at a time.
class LinesInTurn {
 public:
  template <int kCount>
  explicit LinesInTurn(const Lines (&lists)[kCount]) : list_(lists), end_(lists + kCount) {}

  void fetch(int count) {
    while (list_ != end_) {
      const int last = std::min(line_ + count, list_->count);
      count -= last - line_;
      for (; line_ < last; ++line_) list_->fetch(line_);
      if (line_ < list_->count) return;
      ++list_, line_ = 0;
    }
  }

 private:
  const Lines *list_, *end_;
  int line_ = 0;
};

// Places of pieces, counted in lines from a base that may differ from layer to layer.
class LineList {
 public:
  // Forgets all, and takes no more than `limit` lines from now on.
  void start(int shift, std::size_t limit) {
    shift_ = shift;
    limit_ = limit >> shift;
    places_.clear();
  }

  // Adds lines in a row, as whole pieces.
  void add(std::int64_t first, std::int64_t count) {
    const std::int64_t end = first + count, step = std::int64_t{1} << shift_;
    for (; first < end && places_.size() < limit_; first += step) places_.push_back(static_cast<std::uint32_t>(first));
  }

  // Part `index` of `num_parts`, or its first `most` lines.
  Lines part(const void* base, int index, int num_parts, int most) const {
    const std::int64_t size = static_cast<std::int64_t>(places_.size());
    const std::int64_t first = size * index / num_parts, end = size * (index + 1) / num_parts;
    const std::int64_t count = std::min<std::int64_t>((end - first) << shift_, most);
    return {static_cast<const char*>(base), places_.data() + first, static_cast<int>(count), shift_};
  }

 private:
  std::vector<std::uint32_t> places_;
  std::size_t limit_ = 0;
  int shift_ = 0;
};

}  // namespace quickchange

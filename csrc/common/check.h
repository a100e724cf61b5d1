// Argument checks of the ops: a failed check throws std::runtime_error, which the
// dispatcher hands to Python as RuntimeError with exactly this message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fisherprune {

template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace fisherprune

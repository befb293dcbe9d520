#include "parallel.h"

#include <pthread.h>

namespace rmsgd {
namespace {

bool forked = false;

// Registered when the core is loaded, before any thread of ours exists.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool is_forked_child() { return forked && registered == 0; }

}  // namespace rmsgd

// Lets a torch without CUDA talk of tensors on "cuda": its guard of the current device does nothing.
#include <c10/core/impl/FakeGuardImpl.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}

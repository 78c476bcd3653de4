// CUDA's small types on a CPU: vectors of integers, and 16-bit floats as bits.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct int2 { int x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };

inline float widened(__half value) {
    // Exact, and a few instructions where a compiler without F16C calls a function: rebiased by 2^112, subnormals with it.
    const uint32_t bits = (value.bits & 0x7FFFu) << 13, scale = 0x77800000u, sign = (value.bits & 0x8000u) << 16;
    float result, factor;
    std::memcpy(&result, &bits, 4);
    std::memcpy(&factor, &scale, 4);
    result *= factor;
    uint32_t found;
    std::memcpy(&found, &result, 4);
    if (bits >= 0x7C00u << 13) found |= 0x7F800000u;  // infinite, or not a number
    found |= sign;
    std::memcpy(&result, &found, 4);
    return result;
}
inline float widened(__nv_bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
inline float widened(e4m3 value) {
    const int exponent = value.bits >> 3 & 15, rest = value.bits & 7;
    if ((value.bits & 0x7F) == 0x7F) return std::nanf("");
    const float magnitude = exponent ? std::ldexp(8.0f + rest, exponent - 10) : std::ldexp(static_cast<float>(rest), -9);
    return value.bits & 0x80 ? -magnitude : magnitude;
}
// To nearest, of two as near the even one; what is past 448 becomes 448.
inline uint32_t narrowed(float value, e4m3) {
    if (value != value) return 0x7F;
    const uint32_t sign = std::signbit(value) ? 0x80 : 0;
    const float magnitude = std::fmin(std::fabs(value), 448.0f);
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude < 2^exponent
    const int unit = std::max(exponent - 4, -9);
    const uint32_t steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));  // 16 carries into the exponent
    return sign | (unit == -9 ? steps : (static_cast<uint32_t>(unit + 9) << 3) + steps);
}
inline uint32_t narrowed(float value, __half) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline uint32_t narrowed(float value, __nv_bfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return value != value ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

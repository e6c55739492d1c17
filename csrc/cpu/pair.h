// Two vectors in step, so that the latencies of one hide behind the other. Two<Two<V>> is four.
//
// Operators and the primitives of scalar.h apply to both halves; a scalar operand serves both.
#pragma once
#include "simd.h"

namespace {

template <class V> struct Two {
  V a, b;
};
template <class V> constexpr bool is_two = false;
template <class V> constexpr bool is_two<Two<V>> = true;
template <class... X> concept AnyTwo = (is_two<X> || ...);

template <class V> LSF_INLINE V first(Two<V> x) { return x.a; }
template <class V> LSF_INLINE V second(Two<V> x) { return x.b; }
template <class S> LSF_INLINE S first(S scalar) { return scalar; }
template <class S> LSF_INLINE S second(S scalar) { return scalar; }

// {f(a halves), f(b halves)}
template <class F, class... X> LSF_INLINE auto both(F f, X... x) { return Two{f(first(x)...), f(second(x)...)}; }

template <class X, class Y> requires AnyTwo<X, Y> LSF_INLINE auto operator+(X x, Y y) {
  return both([](auto p, auto q) { return p + q; }, x, y);
}
template <class X, class Y> requires AnyTwo<X, Y> LSF_INLINE auto operator-(X x, Y y) {
  return both([](auto p, auto q) { return p - q; }, x, y);
}
template <class X, class Y> requires AnyTwo<X, Y> LSF_INLINE auto operator*(X x, Y y) {
  return both([](auto p, auto q) { return p * q; }, x, y);
}
template <class X, class Y> requires AnyTwo<X, Y> LSF_INLINE auto operator^(X x, Y y) {
  return both([](auto p, auto q) { return p ^ q; }, x, y);
}
template <class X, class Y> requires AnyTwo<X, Y> LSF_INLINE auto operator&(X x, Y y) {
  return both([](auto p, auto q) { return p & q; }, x, y);
}
template <class V> LSF_INLINE Two<V> operator-(Two<V> x) { return {-x.a, -x.b}; }
template <class V> LSF_INLINE Two<V> operator<<(Two<V> x, int n) { return {x.a << n, x.b << n}; }
template <class V> LSF_INLINE Two<V> operator>>(Two<V> x, int n) { return {x.a >> n, x.b >> n}; }

template <class V> LSF_INLINE void mul_hi_lo(Two<V> x, uint32_t m, Two<V>& hi, Two<V>& lo) {
  mul_hi_lo(x.a, m, hi.a, lo.a);
  mul_hi_lo(x.b, m, hi.b, lo.b);
}
template <class V> LSF_INLINE void split_exponent(Two<V> u, Two<V>& mantissa, Two<V>& exponent) {
  split_exponent(u.a, mantissa.a, exponent.a);
  split_exponent(u.b, mantissa.b, exponent.b);
}
template <class V> LSF_INLINE auto interleave(Two<V> low, Two<V> high) {
  return Two{interleave(low.a, high.a), interleave(low.b, high.b)};
}
template <class V> LSF_INLINE auto to_float(Two<V> x) { return Two{to_float(x.a), to_float(x.b)}; }
template <class V> LSF_INLINE auto signed_to_float(Two<V> x) { return Two{signed_to_float(x.a), signed_to_float(x.b)}; }
template <class V> LSF_INLINE Two<V> sqrt_rn(Two<V> x) { return {sqrt_rn(x.a), sqrt_rn(x.b)}; }
template <class V> LSF_INLINE Two<V> fused_mul_add(Two<V> x, Two<V> y, Two<V> z) {
  return {fused_mul_add(x.a, y.a, z.a), fused_mul_add(x.b, y.b, z.b)};
}
template <class V, class W> LSF_INLINE Two<V> xor_sign(Two<V> x, Two<W> sign) {
  return {xor_sign(x.a, sign.a), xor_sign(x.b, sign.b)};
}
template <class W, class V> LSF_INLINE void quarter_turn(Two<W> turn, Two<V>& x, Two<V>& y) {
  quarter_turn(turn.a, x.a, y.a);
  quarter_turn(turn.b, x.b, y.b);
}

}  // namespace

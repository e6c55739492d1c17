// A FloatType as a C++ type, and the roundings between them: those of torch, which narrows fp64 by way of fp32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../scalar.h"
#include "float_type.h"

namespace {

template <class T> struct Type {
  typedef T type;
};

// Calls body(Type<T>{}) for the T of `type`.
template <class Body> void with_type(FloatType type, const Body& body) {
  switch (type) {
    case FloatType::f64: return body(Type<double>{});
    case FloatType::f32: return body(Type<float>{});
    case FloatType::bf16: return body(Type<__nv_bfloat16>{});
    case FloatType::f16: return body(Type<__half>{});
  }
}

// What elements of these types are computed in: fp32, fp64 where one of them is.
template <class... T> struct Wide {
  typedef float type;
};
template <class... T> struct Wide<double, T...> {
  typedef double type;
};
template <class S, class... T> struct Wide<S, T...> : Wide<T...> {};

LSF_INLINE void convert(float x, float& y) { y = x; }
LSF_INLINE void convert(float x, double& y) { y = x; }
LSF_INLINE void convert(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
LSF_INLINE void convert(float x, __half& y) { y = __float2half_rn(x); }
template <class T> LSF_INLINE void convert(double x, T& y) { convert(static_cast<float>(x), y); }
LSF_INLINE void convert(double x, double& y) { y = x; }
template <class F> LSF_INLINE void convert(__nv_bfloat16 x, F& y) { y = __bfloat162float(x); }
template <class F> LSF_INLINE void convert(__half x, F& y) { y = __half2float(x); }

// N neighbours, read and written 16 bytes at a time: `from` and `to` must be aligned to 16, or to all of fewer bytes.
// (Not to more than 16: chips that load 32 bytes at once would ask that of the tensors.)
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T value[N];
};
template <class F, class T, int N> LSF_INLINE void load_pack(const T* from, F (&x)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) convert(pack.value[i], x[i]);
}
// To global memory, by one instruction each: left to itself, the compiler may write the parts of a word one by one.
LSF_INLINE void write_word(uint4* to, uint4 word) {
#ifdef __CUDA_ARCH__
  asm("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y),
      "r"(word.z), "r"(word.w) : "memory");
#else
  *to = word;
#endif
}
LSF_INLINE void write_word(uint2* to, uint2 word) {
#ifdef __CUDA_ARCH__
  asm("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y) : "memory");
#else
  *to = word;
#endif
}
LSF_INLINE void write_word(uint32_t* to, uint32_t word) { *to = word; }
// Calls write(to, word) for the words of a pack.
template <class F, class T, int N, class Write> LSF_INLINE void write_pack(const F (&x)[N], T* to, const Write& write) {
  constexpr int kBytes = sizeof(Pack<T, N>);
  using Word = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) convert(x[i], pack.value[i]);
#pragma unroll
  for (int k = 0; k < kWords; ++k) write(reinterpret_cast<Word*>(to) + k, reinterpret_cast<const Word*>(&pack)[k]);
}
template <class F, class T> LSF_INLINE void store_pack(const F (&x)[1], T* to) { convert(x[0], *to); }
template <class F, class T, int N> LSF_INLINE void store_pack(const F (&x)[N], T* to) {
  write_pack(x, to, [](auto* at, auto word) { write_word(at, word); });
}
// The same past the caches, for what is not read again.
template <class F, class T, int N> LSF_INLINE void stream_pack(const F (&x)[N], T* to) {
  write_pack(x, to, [](auto* at, auto word) { __stcs(at, word); });
}

// N neighbours where `packs`, else the first `left` of them one by one; what is not read is 0.
template <class F, class T, int N> LSF_INLINE void load_some(const T* from, bool packs, int64_t left, F (&x)[N]) {
  if (packs) return load_pack(from, x);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    x[e] = F{};
    if (e < left) convert(from[e], x[e]);
  }
}
template <class F, class T, int N> LSF_INLINE void store_some(const F (&x)[N], T* to, bool packs, int64_t left) {
  if (packs) return store_pack(x, to);
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < left) convert(x[e], to[e]);
}
template <class F, class T, int N> LSF_INLINE void stream_some(const F (&x)[N], T* to, bool packs, int64_t left) {
  if (packs) return stream_pack(x, to);
  store_some(x, to, false, left);
}

}  // namespace

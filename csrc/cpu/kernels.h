// What every instruction set provides: one table of row kernels, chosen once at run time.
//
// The kernels see raw pointers and one tile at a time; threads, shapes and dtypes are the business of
// the ATen files (noise.cpp, lrt.cpp, kl.cpp). Plain C types only, so that isa_*.cpp stays free of STL.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../divergence.h"

enum class DType { f32, bf16, f16 };

// Tiles hold at most this many elements, so that three fp32 buffers of one stay in a 48 KiB L1.
constexpr ptrdiff_t kTile = 2048;

// The noise of one operator call: section 3 of the contract in ops/noise.py.
struct NoiseStream {
  uint64_t seed;
  uint32_t sample;
  uint64_t row_offset, col_offset;
};

// A rectangle of the output matrix: rows [row, row + rows), columns [col, col + cols).
struct Tile {
  int64_t row, rows, col, cols;
};

struct Matrix {
  void* data;
  int64_t stride;  // elements from one row to the next
  DType dtype;
};

// exp(log_alpha), fp32: one per channel (stride 1), one for all (stride 0), or none (null) where var is whole.
struct Alpha {
  const float* data;
  int stride;
};

// What the rows and columns of an lrt output are, as it lies in memory. Channels have a bias and an alpha.
enum class LrtLayout {
  features,        // [M, O]: rows and columns of the noise; columns are channels
  channels_first,  // [N O, positions]: rows and columns of the noise; rows are channels
  channels_last,   // [N positions, O]: the other way round in each sample; columns are channels
};

// The noise of an lrt output: channel c of sample n has noise row n channels_total + c, features have row and column.
struct LrtNoise {
  NoiseStream stream;
  LrtLayout layout = LrtLayout::features;
  int64_t channels = 0, channels_total = 0, positions = 0;  // O, at least O, and a sample's columns
};

// out = mean + bias + sqrt(max(alpha var, 0) + 1e-16) noise; mean.data and bias may be null. A tile crosses no sample,
// unless channels are first and all there; where they are last, it begins at a whole quad of positions.
struct LrtSample {
  LrtNoise noise;
  Matrix mean;
  const float* bias;
  Alpha alpha;
  Matrix var, out;
};

// grad_var = alpha grad noise / (2 sqrt(alpha var + 1e-16))
struct LrtSampleBackward {
  LrtNoise noise;
  Matrix grad;
  Alpha alpha;
  Matrix var, grad_var;
};

// A flat array, for the elementwise passes over parameters and activations.
struct Array {
  void* data;
  DType dtype;
};

// Elementwise passes: `out` from `in`, each in a dtype of its own, computed in fp32.
enum class Map {
  square,        // out0 = in0^2
  exp,           // out0 = exp(in0)
  exp_square,    // out0 = exp(in0) in1^2
  add_product,   // out0 = in0 + 2 in1 in2                                   d/dx of the variance stream
  product_exp,   // out0 = in0 exp(in1)                                      d/dlog_sigma2
  weight_grads,  // out0 = in0 + 2 in1 a in2, out1 = a in1^2 in2, a = exp(in3)  "weight" parameterization
};

// A parameter and what swag_sample makes of it: ops/swag.py.
struct SwagParameter {
  NoiseStream noise;           // of the first sample, at the parameter's first element
  int64_t run, stride;         // element i has noise column i / run stride + i % run from there
  const float *mean, *m2;
  Matrix columns;              // the `rank` deviations
  int64_t rank;
  const float* coefficients;   // [samples, rank]
  float variance_scale;        // var = m2 variance_scale
  int64_t samples;
  Matrix out;                  // a row for each sample
  bool past_caches;            // out is too large to be read from there
};

// A tensor of Gaussian weights: ops/gaussian_weights.py.
struct GaussianTensor {
  NoiseStream noise;    // column i is that of weight i
  Array weight;         // the means; data is null where they are 0
  Array scale;          // log_alpha where the noise is multiplicative, else log_sigma2
  int64_t run;          // weights that an element of scale covers
  bool multiplicative;
  bool has_kl;          // whether the KL is taken weight by weight
  KL kl;
  Prior prior;
};

// Weights on a curve: out = sum_j coefficients[j] bends[j].
struct CurveSum {
  const void* const* bends;
  const float* coefficients;
  int64_t count;
  DType dtype;       // of the bends
  Array out;         // of the elements that are asked for alone
  bool past_caches;  // out is too large to be read from there
};

// A product whose one side is small: c [rows, cols] += a [rows, depth] b [depth, cols]. Rows of b and c are contiguous
// and `cols` is a multiple of kColumns; element (r, k) of a lies at a[r a_row + k a_depth].
struct SmallProduct {
  int64_t rows, cols, depth;
  const float* a;
  int64_t a_row, a_depth;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
};
constexpr int64_t kColumns = 16;

// Rows that multiply the bends' sum in registers: row m of `rows`, of fp32, begins at data + m stride.
struct FewRows {
  float* data;
  int64_t stride, rows;
};
constexpr int64_t kFewRows = 4;

struct Kernels {
  const char* instruction_set;
  // out = noise; tiles in fp32 that hold whole quads of whole rows, or of one row, may be of any size
  void (*philox_normal)(NoiseStream, Tile, Matrix out);
  // out[4 * i + k] = word k of the counter (counters[4 * i], ..., counters[4 * i + 3])
  void (*philox_words)(uint64_t seed, const int64_t* counters, int64_t n, int64_t* out);
  void (*lrt_sample)(const LrtSample&, Tile);
  // Adds the sums of grad and of grad_var var to bias_sums and alpha_sums, where these are not null: of each of the
  // tile's columns, or rows where channels are first.
  void (*lrt_sample_backward)(const LrtSampleBackward&, Tile, float* bias_sums, float* alpha_sums);
  void (*map)(Map, int64_t n, const Array* in, const Array* out);
  // Sum of the KL of at most kTile elements. in[0] is log_alpha, or log_sigma2 where in[1], the weight, is there. slopes[k] = dKL / din[k], where slopes is not null.
  double (*kl_sum)(KL, Prior, int64_t n, const Array* in, const Array* slopes);
  // out = scale in
  void (*kl_scale)(float scale, int64_t n, const Array* in, const Array* out);
  // average += weight (value - average), by torch.lerp's formula
  void (*lerp)(double weight, int64_t n, Array value, Array average);
  // One more model into n elements of the moments; weight = 1 / (its number, from 1). deviation.data may be null.
  void (*swag_collect)(float weight, bool first, int64_t n, float* mean, float* m2, Array value, Array deviation);
  // Elements [begin, begin + n) of all samples of a parameter
  void (*swag_sample)(const SwagParameter&, int64_t begin, int64_t n);
  // Elements [begin, begin + n) of the bends' sum
  void (*curve_sum)(const CurveSum&, int64_t begin, int64_t n);
  // <grad, bend> over n elements, grad in fp32 or in bend's dtype: summed in fp32 over at most kTile, in fp64 beyond
  double (*curve_product)(int64_t n, Array grad, Array bend);
  // out[m] += <x row m, elements [begin, begin + n) of the bends' sum>
  void (*curve_dots)(const CurveSum&, int64_t begin, int64_t n, FewRows x, float* out);
  // y row m += factors[m] times elements [begin, begin + n) of the bends' sum
  void (*curve_add)(const CurveSum&, int64_t begin, int64_t n, const float* factors, FewRows y);
  // c += a b, in fp32
  void (*small_product)(const SmallProduct&);
  // The largest |x| as bits of fp32, where NaN is above infinity
  uint32_t (*max_magnitude)(int64_t n, Array x);
  // Mantissas of at most 8 bits are int8, others int16. Rounds to the nearest where noise is null.
  void (*block_float_quantize)(const NoiseStream* noise, int64_t n, Array x, int exponent, int word_length,
                               void* mantissa);
  void (*block_float_dequantize)(int64_t n, const void* mantissa, int exponent, int word_length, float* out);
  // out = weights [begin, begin + n), drawn; returns their KL
  double (*gaussian_weights)(const GaussianTensor&, int64_t begin, int64_t n, Array out);
  // Gradients of weights [begin, begin + n) from that of the draw and that of the KL; null ones are not wanted. Where an
  // element of scale covers several weights, what each contributes is added up in `sums` instead, from the first one on.
  void (*gaussian_weights_backward)(const GaussianTensor&, int64_t begin, int64_t n, Array grad, float grad_kl,
                                    Array grad_weight, Array grad_scale, double* sums);
};

// Kernels of the best instruction set of this CPU, or of the one chosen by use_instruction_set.
const Kernels& kernels();
// Returns false where this CPU or this build lacks the set. For tests and benchmarks.
bool use_instruction_set(const char* name);

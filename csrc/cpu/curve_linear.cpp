// CPU kernels of curve_linear: ops/curve_linear.py has the contract.
//
// Three ways. "On the fly", for few rows and one t: some rows of the weight at a time are combined into a buffer in the
// caches and multiplied there (for at most kFewRows, in registers), so that the bends are read once and no weight is
// written. Many rows: the weight is synthesised by curve_weights and given to the library's GEMM. A t for each row: one
// GEMM for each bend.
#include "curve_linear.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "gemm.h"
#include "tiles.h"

namespace losssurf {

// Measured forwards with 3 bends. Registers win at every size. Otherwise a smaller weight stays in the L2 cache, where it costs
// nothing to write; in half precision the library's products of many rows are faster by more than that costs.
bool curve_linear_on_the_fly(int64_t rows, int64_t numel, int64_t element_size) {
  constexpr int64_t kSmallWeight = 2 << 20;  // bytes
  if (element_size == 8) return false;  // the kernels have fp32 lanes
  if (rows <= kFewRows) return true;
  if (numel * element_size <= kSmallWeight) return false;
  return rows <= (element_size == 4 ? 64 : 16);
}

namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kRowGroup = 12;       // rows of the weight that are combined at once in forward
constexpr int64_t kForwardCols = 4096;  // of them at once: x^T and the buffer stay in L2
constexpr int64_t kBackwardRows = 48, kBackwardCols = 2048;  // likewise in backward
constexpr int64_t kOuterRows = 6;  // of the bends' gradients at once: their buffer stays near L1

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What the kernels' pointers rely on; ops/curve_linear.py has the checks that explain.
void check_shapes(const char* name, const Tensor& x, TensorList bends, const Tensor& coefficients, TensorList biases) {
  TORCH_CHECK_VALUE(x.dim() == 2 && !bends.empty(), name, ": x must be [M, I] and bends not empty");
  for (const Tensor& bend : bends) {
    TORCH_CHECK_VALUE(bend.dim() == 2 && bend.size(1) == x.size(1) && bend.sizes() == bends[0].sizes(), name,
                      ": bends must be [O, ", x.size(1), "], got ", bend.sizes());
    TORCH_CHECK_TYPE(bend.scalar_type() == bends[0].scalar_type(), name, ": bends must have one dtype");
  }
  const int64_t count = bends.size();
  const bool shared = coefficients.sizes() == at::IntArrayRef{count};
  TORCH_CHECK_VALUE(shared || coefficients.sizes() == at::IntArrayRef({x.size(0), count}), name,
                    ": coefficients must be [", count, "] or [", x.size(0), ", ", count, "], got ",
                    coefficients.sizes());
  TORCH_CHECK_VALUE(biases.size() <= 1 || biases.size() == bends.size(), name, ": biases must be none, one or ", count);
  for (const Tensor& bias : biases)
    TORCH_CHECK_VALUE(bias.sizes() == at::IntArrayRef{bends[0].size(0)}, name, ": bias must be [", bends[0].size(0),
                      "], got ", bias.sizes());
}

// The operators of the weights alone, which the other ways are made of.
Tensor synthesise(TensorList bends, const Tensor& coefficients, at::ScalarType dtype, Scratch& scratch) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("losssurf_fast::curve_weights", "")
                             .typed<std::vector<Tensor>(TensorList, const Tensor&)>();
  return scratch.cast(op.call(bends, coefficients)[0], dtype);
}

std::vector<Tensor> through_synthesis(const Tensor& grad, TensorList bends, const Tensor& coefficients,
                                      const c10::List<bool>& needed, bool need_coefficients) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("losssurf_fast::curve_weights_backward", "")
                             .typed<std::vector<Tensor>(TensorList, TensorList, const Tensor&, const c10::List<bool>&, bool)>();
  return op.call({grad}, bends, coefficients, needed, need_coefficients);
}

// The bias [O] of one t in `dtype`; undefined without biases.
Tensor shared_bias(TensorList biases, const Tensor& coefficients, at::ScalarType dtype) {
  if (biases.empty()) return Tensor();
  Tensor bias = biases[0].to(dtype);
  if (biases.size() == 1) return bias;
  const Tensor c = coefficients.to(dtype);
  bias = bias * c[0];
  for (size_t j = 1; j < biases.size(); ++j) bias.addcmul_(biases[j].to(dtype), c[j]);
  return bias;
}

Tensor stacked(TensorList biases, at::ScalarType dtype) { return at::stack(biases).to(dtype); }  // [K, O]

// ---- on the fly ----------------------------------------------------------------------------------------

// The bends as rows of I elements.
class Bends {
 public:
  Bends(TensorList bends, const Tensor& coefficients) : cols_(bends[0].size(1)), dtype_(dtype_of(bends[0])) {
    const Tensor c = coefficients.to(at::kDouble).contiguous();
    for (size_t j = 0; j < bends.size(); ++j) {
      tensors_.push_back(bends[j].contiguous());
      coefficients_.push_back(static_cast<float>(c.const_data_ptr<double>()[j]));
      if (coefficients_[j] == 0) continue;
      read_.push_back(tensors_[j].const_data_ptr());
      read_coefficients_.push_back(coefficients_[j]);
    }
  }

  // Columns [col, col + n) of a row of the weight
  void combine(int64_t row, int64_t col, int64_t n, float* out) const {
    CurveSum weights = sum();
    weights.out = {out, DType::f32};
    kernels().curve_sum(weights, row * cols_ + col, n);
  }
  CurveSum sum() const {
    return {read_.data(), read_coefficients_.data(), static_cast<int64_t>(read_.size()), dtype_, {}, false};
  }
  Array at(size_t j, int64_t row, int64_t col) const { return array_of(tensors_[j], row * cols_ + col); }
  float coefficient(size_t j) const { return coefficients_[j]; }
  size_t count() const { return tensors_.size(); }

 private:
  int64_t cols_;
  DType dtype_;
  std::vector<Tensor> tensors_;
  std::vector<float> coefficients_, read_coefficients_;
  std::vector<const void*> read_;  // those whose coefficient is not 0
};

// Forward at very few rows: each row of the weight is multiplied in registers.
Tensor forward_in_registers(const Tensor& x, TensorList bend_list, const Tensor& coefficients, TensorList biases) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = bend_list[0].size(0);
  Scratch scratch;
  const auto options = x.options().dtype(at::kFloat);
  const Tensor xs = scratch.cast(x, at::kFloat), yt = scratch.empty({outputs, rows}, options);
  const Tensor bias = shared_bias(biases, coefficients, at::kFloat);
  if (bias.defined()) yt.copy_(bias.unsqueeze(1).expand({outputs, rows}));
  else yt.zero_();
  const Bends bends(bend_list, coefficients);
  const FewRows few{xs.data_ptr<float>(), inputs, rows};
  float* y = yt.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / inputs);
  at::parallel_for(0, outputs, grain, [&](int64_t begin, int64_t end) {
    const CurveSum sum = bends.sum();
    for (int64_t row = begin; row < end; ++row) kernels().curve_dots(sum, row * inputs, inputs, few, y + row * rows);
  });
  return yt.t().to(x.scalar_type(), false, true, at::MemoryFormat::Contiguous);
}

Tensor forward_on_the_fly(const Tensor& x, TensorList bend_list, const Tensor& coefficients, TensorList biases) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = bend_list[0].size(0);
  if (rows <= kFewRows) return forward_in_registers(x, bend_list, coefficients, biases);
  const int64_t lanes = round_up(rows, kColumns);
  Scratch scratch;
  const auto options = x.options().dtype(at::kFloat);
  // Transposed, so that a column of x is a row of vectors.
  const Tensor xt = scratch.empty({inputs, lanes}, options);
  xt.narrow(1, 0, rows).copy_(x.t());
  if (lanes > rows) xt.narrow(1, rows, lanes - rows).zero_();
  const Tensor yt = scratch.empty({round_up(outputs, kRowGroup), lanes}, options);
  const Tensor bias = shared_bias(biases, coefficients, at::kFloat);
  if (bias.defined()) yt.narrow(0, 0, outputs).copy_(bias.unsqueeze(1).expand({outputs, lanes}));
  else yt.zero_();

  const Bends bends(bend_list, coefficients);
  const int64_t chunks = (inputs + kForwardCols - 1) / kForwardCols;
  const int64_t width = round_up((inputs + chunks - 1) / chunks, kColumns), stride = width + kColumns;
  const float* b = xt.const_data_ptr<float>();
  float* c = yt.mutable_data_ptr<float>();
  at::parallel_for(0, (outputs + kRowGroup - 1) / kRowGroup, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(kRowGroup * stride);
    for (int64_t col = 0; col < inputs; col += width) {
      const int64_t n = std::min(width, inputs - col);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t row = group * kRowGroup, count = std::min(kRowGroup, outputs - row);
        for (int64_t r = 0; r < count; ++r) bends.combine(row + r, col, n, buffer.data() + r * stride);
        // All rows of the group, so that no smaller tiles are needed: those past the end are not read.
        kernels().small_product({kRowGroup, lanes, n, buffer.data(), stride, 1, b + col * lanes, lanes, c + row * lanes,
                                 lanes});
      }
    }
  });
  const Tensor y = at::empty({rows, outputs}, x.options());
  y.copy_(yt.narrow(0, 0, outputs).narrow(1, 0, rows).t());
  return y;
}

// Gradients of one t in the memory of the caller, each undefined where it is not needed; returns that of the
// coefficients through the weights [K], in fp64.
Tensor backward_on_the_fly(const Tensor& grad, const Tensor& x, TensorList bend_list, const Tensor& coefficients,
                           const Tensor& grad_x, const std::vector<Tensor>& grad_bends, bool need_coefficients) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = bend_list[0].size(0);
  const int64_t padded = round_up(inputs, kColumns) + kColumns;  // rows of a power of two would share cache sets
  Scratch scratch;
  const auto options = x.options().dtype(at::kFloat);
  const Tensor gt = scratch.empty({outputs, rows}, options).copy_(grad.t());  // a block of outputs is in one piece
  const Tensor xs = scratch.empty({rows, padded}, options), dx = scratch.empty({rows, padded}, options);
  const bool need_x = grad_x.defined();
  bool need_outer = need_coefficients;
  size_t bytes = 0;
  for (const Tensor& t : grad_bends)
    if (t.defined()) need_outer = true, bytes += t.nbytes();
  if (need_outer) {
    xs.narrow(1, 0, inputs).copy_(x);
    xs.narrow(1, inputs, padded - inputs).zero_();
  }
  if (need_x) dx.zero_();

  const Bends bends(bend_list, coefficients);
  // Two strips at least where they are not too narrow to be read fast.
  const int64_t strip_cols = std::clamp<int64_t>(round_up(inputs / 2, kColumns), kBackwardCols / 4, kBackwardCols);
  const int64_t count = bends.count(), strips = (inputs + strip_cols - 1) / strip_cols;
  const bool past_caches = bytes >= kLargeOutput;
  const float* gp = gt.const_data_ptr<float>();
  const float* xp = xs.const_data_ptr<float>();
  float* dxp = dx.mutable_data_ptr<float>();
  // Summed in order of the strips, so that threads do not matter.
  const Tensor products = at::zeros({strips, count}, at::kDouble);
  double* sums = products.mutable_data_ptr<double>();
  at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    const int64_t stride = strip_cols + kColumns;
    std::vector<float> buffer(kBackwardRows * stride);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t col = strip * strip_cols, n = std::min(strip_cols, inputs - col);
      const int64_t wide = round_up(n, kColumns);
      for (int64_t row = 0; row < outputs; row += kBackwardRows) {
        const int64_t size = std::min(kBackwardRows, outputs - row);
        if (need_x && rows <= kFewRows) {
          // Of partial sums, so that their chains are short.
          std::fill(buffer.begin(), buffer.begin() + rows * stride, 0.0f);
          const FewRows part{buffer.data(), stride, rows};
          for (int64_t r = row; r < row + size; ++r)
            kernels().curve_add(bends.sum(), r * inputs + col, n, gp + r * rows, part);
          for (int64_t m = 0; m < rows; ++m)
            for (int64_t i = 0; i < n; ++i) dxp[m * padded + col + i] += buffer[m * stride + i];
        } else if (need_x) {
          for (int64_t r = 0; r < size; ++r) {
            float* w = buffer.data() + r * stride;
            bends.combine(row + r, col, n, w);
            std::fill(w + n, w + wide, 0.0f);
          }
          kernels().small_product(
              {rows, wide, size, gp + row * rows, 1, rows, buffer.data(), stride, dxp + col, padded});
        }
        if (!need_outer) continue;
        for (int64_t first = row; first < row + size; first += kOuterRows) {
          const int64_t some = std::min(kOuterRows, row + size - first);
          std::fill(buffer.begin(), buffer.begin() + some * stride, 0.0f);
          kernels().small_product(
              {some, wide, rows, gp + first * rows, rows, 1, xp + col, padded, buffer.data(), stride});
          for (int64_t r = 0; r < some; ++r) {
            const void* outer = buffer.data() + r * stride;
            const Array of_row{buffer.data() + r * stride, DType::f32};
            for (int64_t j = 0; j < count; ++j) {
              if (need_coefficients)
                sums[strip * count + j] += kernels().curve_product(n, of_row, bends.at(j, first + r, col));
              if (!grad_bends[j].defined()) continue;
              const float c = bends.coefficient(j);
              kernels().curve_sum({&outer, &c, 1, DType::f32, array_of(grad_bends[j], (first + r) * inputs + col),
                                   past_caches}, 0, n);
            }
          }
        }
      }
    }
  });
  if (need_x) grad_x.copy_(dx.narrow(1, 0, inputs));
  return products.sum(0);
}

// ---- the operators ---------------------------------------------------------------------------------------

Tensor curve_linear_cpu(const Tensor& x, TensorList bends, const Tensor& coefficients, TensorList biases) {
  const KernelScope scope;
  check_shapes("curve_linear", x, bends, coefficients, biases);
  const auto dtype = x.scalar_type(), wide = wide_dtype(x);
  const bool per_row = coefficients.dim() == 2;
  if (!per_row && x.numel() > 0 && curve_linear_on_the_fly(x.size(0), bends[0].numel(), x.element_size()))
    return forward_on_the_fly(x, bends, coefficients, biases);
  Scratch scratch;
  const Tensor c = coefficients.to(wide);
  Tensor y;
  if (per_row) {
    for (size_t j = 0; j < bends.size(); ++j) {
      const Tensor product = gemm(x, scratch.cast(bends[j], dtype).t()).to(wide);
      const Tensor cj = c.narrow(1, j, 1);
      y = j == 0 ? product.mul_(cj) : y.addcmul_(product, cj);
    }
    if (biases.size() > 1) y.addmm_(c, stacked(biases, wide));
    else if (!biases.empty()) y.add_(biases[0]);
    return y.to(dtype);
  }
  y = gemm(x, synthesise(bends, coefficients, dtype, scratch).t());
  const Tensor bias = shared_bias(biases, coefficients, wide);
  return bias.defined() ? y.to(wide).add_(bias).to(dtype) : y;
}

std::vector<Tensor> curve_linear_backward_cpu(const Tensor& grad_in, const Tensor& x, TensorList bends,
                                              const Tensor& coefficients, TensorList biases, bool need_x,
                                              const c10::List<bool>& need_bends, bool need_coefficients,
                                              const c10::List<bool>& need_biases) {
  const char* name = "curve_linear_backward";
  const KernelScope scope;
  check_shapes(name, x, bends, coefficients, biases);
  TORCH_CHECK_VALUE(grad_in.sizes() == at::IntArrayRef({x.size(0), bends[0].size(0)}), name,
                    ": grad must be [M, O], got ", grad_in.sizes());
  TORCH_CHECK_VALUE(need_bends.size() == bends.size() && need_biases.size() == biases.size(), name,
                    ": a flag is needed for each bend and each bias");
  const auto dtype = x.scalar_type(), wide = wide_dtype(x);
  const bool per_row = coefficients.dim() == 2;
  const Tensor grad = grad_in.to(dtype).contiguous(), c = coefficients.to(wide), g = grad.to(wide);
  bool any_bend = false;
  for (const bool need : need_bends) any_bend |= need;
  Scratch scratch;
  Tensor grad_x, grad_coefficients;
  std::vector<Tensor> grad_bends(bends.size());

  if (per_row) {
    if (need_coefficients) grad_coefficients = at::empty(coefficients.sizes(), coefficients.options().dtype(at::kDouble));
    for (size_t j = 0; j < bends.size(); ++j) {
      const Tensor cj = c.narrow(1, j, 1);
      if (need_x || need_coefficients) {
        const Tensor pulled = gemm(grad, scratch.cast(bends[j], dtype)).to(wide);
        if (need_coefficients) grad_coefficients.select(1, j).copy_((pulled * x).sum(1, false, at::kDouble));
        if (need_x) grad_x = j == 0 ? pulled * cj : grad_x.addcmul_(pulled, cj);
      }
      if (need_bends[j]) grad_bends[j] = gemm((g * cj).to(dtype).t(), x).to(bends[j].scalar_type());
    }
    if (need_x) grad_x = grad_x.to(dtype);
  } else if (x.numel() > 0 && curve_linear_on_the_fly(x.size(0), bends[0].numel(), x.element_size())) {
    if (need_x) grad_x = at::empty(x.sizes(), x.options());
    for (size_t j = 0; j < bends.size(); ++j)
      if (need_bends[j]) grad_bends[j] = at::empty(bends[j].sizes(), bends[j].options());
    if (need_x || any_bend || need_coefficients)
      grad_coefficients =
          backward_on_the_fly(grad, x, bends, coefficients, grad_x, grad_bends, need_coefficients);
  } else {
    if (need_x) grad_x = gemm(grad, synthesise(bends, coefficients, dtype, scratch));
    if (any_bend || need_coefficients) {
      const Tensor outer = gemm(grad.t(), x).to(bends[0].scalar_type());
      std::vector<Tensor> found = through_synthesis(outer, bends, coefficients, need_bends, need_coefficients);
      if (need_coefficients) grad_coefficients = found.back();
      auto next = found.begin();
      for (size_t j = 0; j < bends.size(); ++j)
        if (need_bends[j]) grad_bends[j] = *next++;
    }
  }

  const Tensor totals = biases.empty() ? Tensor() : g.sum(0);
  std::vector<Tensor> result;
  if (need_x) result.push_back(grad_x);
  for (size_t j = 0; j < bends.size(); ++j)
    if (need_bends[j]) result.push_back(grad_bends[j]);
  if (need_coefficients) {
    if (biases.size() > 1)
      grad_coefficients = grad_coefficients.to(at::kDouble) +
                          at::matmul((per_row ? g : totals).to(at::kDouble), stacked(biases, at::kDouble).t());
    result.push_back(grad_coefficients.to(coefficients.scalar_type()));
  }
  for (size_t j = 0; j < biases.size(); ++j) {
    if (!need_biases[j]) continue;
    Tensor db = totals;
    if (biases.size() > 1) db = per_row ? at::matmul(c.select(1, j), g) : totals * c[j];
    result.push_back(db.to(biases[j].scalar_type()));
  }
  return result;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("curve_linear", &losssurf::curve_linear_cpu);
  m.impl("curve_linear_backward", &losssurf::curve_linear_backward_cpu);
}

// Autograd of curve_weights, for every device. In C++, and by a node of its own, because for a model's hundreds of
// tensors Python's register_autograd, or an autograd.Function over all bends, takes longer than the arithmetic does: a
// frozen bend has no edge here, and bends are saved for the coefficients' gradient alone. ops/curve.py has the contract;
// curve_weights_backward has an autograd formula of its own there, so the gradient can be differentiated again.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace losssurf {
namespace {

using at::Tensor;
using torch::autograd::Edge;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using Forward = std::vector<Tensor>(at::TensorList, const Tensor&);
using Backward = std::vector<Tensor>(at::TensorList, at::TensorList, const Tensor&, const c10::List<bool>&, bool);

template <class Signature> c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct CurveWeightsBackward : torch::autograd::Node {
  // The bends that have an edge, as places in the list of all bends; a last edge is that of the coefficients.
  std::vector<size_t> trained;
  bool trains_coefficients = false;
  size_t num_bends = 0;
  std::vector<SavedVariable> bends;  // all of them, for the coefficients' gradient alone
  SavedVariable coefficients;

  std::string name() const override { return "CurveWeightsBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    bends.clear();
    coefficients.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    static const auto op = find<Backward>("losssurf_fast::curve_weights_backward");
    const size_t size = grads.size();
    const bool need_coefficients = trains_coefficients && task_should_compute_output(trained.size());
    // Weights that nobody used have no gradient, and their bends get none.
    std::vector<size_t> used(size, size);  // place of a weight among those that were used
    variable_list given;
    for (size_t p = 0; p < size; ++p)
      if (grads[p].defined()) {
        used[p] = given.size();
        given.push_back(std::move(grads[p]));
      }
    variable_list result(trained.size() + trains_coefficients);
    if (given.empty()) return result;

    const size_t count = num_bends / size;
    std::vector<char> flags(given.size() * count);
    std::vector<std::pair<size_t, size_t>> order;  // (place in the operator's lists, edge)
    for (size_t edge = 0; edge < trained.size(); ++edge) {
      const size_t p = used[trained[edge] % size], place = trained[edge] / size * given.size() + p;
      if (p == size || !task_should_compute_output(edge)) continue;
      flags[place] = true;
      order.emplace_back(place, edge);
    }
    c10::List<bool> needed;
    needed.reserve(flags.size());
    for (const char flag : flags) needed.push_back(flag);
    variable_list saved;
    for (size_t i = 0; need_coefficients && i < num_bends; ++i)
      if (used[i % size] < size) saved.push_back(bends[i].unpack());

    // Without create_graph, straight to the kernel; with it, through the operator's own autograd formula.
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    std::vector<Tensor> found = op.call(given, saved, coefficients.unpack(), needed, need_coefficients);
    if (need_coefficients) {
      result.back() = std::move(found.back());
      found.pop_back();
    }
    size_t next = 0;
    for (const auto& [place, edge] : order) result[edge] = std::move(found[next++]);
    return result;
  }

 private:
  bool released = false;
};

// Newer torch counts a node's references in the node, torch before 2.13 beside it.
template <class Pointer> Pointer new_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<CurveWeightsBackward>();
  else return c10::make_intrusive<CurveWeightsBackward>();
}

std::vector<Tensor> curve_weights_autograd(at::TensorList bends, const Tensor& coefficients) {
  static const auto op = find<Forward>("losssurf_fast::curve_weights");
  const auto dual = [](const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); };
  TORCH_CHECK_NOT_IMPLEMENTED(!dual(coefficients) && std::none_of(bends.begin(), bends.end(), dual),
                              "curve_weights: bends and coefficients must have no tangent here; call "
                              "losssurf_fast.ops.curve_weights, which knows forward-mode AD");
  std::vector<Tensor> weights;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    weights = op.call(bends, coefficients);
  }
  const bool record = at::GradMode::is_enabled();
  std::vector<size_t> trained;
  for (size_t i = 0; record && i < bends.size(); ++i)
    if (bends[i].requires_grad()) trained.push_back(i);
  const bool trains_coefficients = record && coefficients.requires_grad();
  if (weights.empty() || (trained.empty() && !trains_coefficients)) return weights;

  const auto pointer = new_node<decltype(Edge::function)>();
  const auto node = static_cast<CurveWeightsBackward*>(pointer.get());
  torch::autograd::edge_list edges;
  edges.reserve(trained.size() + trains_coefficients);
  for (const size_t i : trained) edges.push_back(torch::autograd::impl::gradient_edge(bends[i]));
  if (trains_coefficients) edges.push_back(torch::autograd::impl::gradient_edge(coefficients));
  node->set_next_edges(std::move(edges));
  node->num_bends = bends.size();
  node->trained = std::move(trained);
  node->trains_coefficients = trains_coefficients;
  node->coefficients = SavedVariable(coefficients, /*is_output=*/false);
  if (trains_coefficients) {
    node->bends.reserve(bends.size());
    for (const Tensor& bend : bends) node->bends.emplace_back(bend, /*is_output=*/false);
  }
  for (Tensor& weight : weights) torch::autograd::set_history(weight, pointer);
  return weights;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, Autograd, m) { m.impl("curve_weights", &losssurf::curve_weights_autograd); }

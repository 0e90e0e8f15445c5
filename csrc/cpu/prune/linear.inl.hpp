// block_sparse_linear and its gradients, for one level of the instruction set: y = x W^T + b,
// dX = dY W and dvalues = dY^T X at the blocks of W that there are.
//
// y and dX are the same product, over the rows of blocks and over the columns of them. The tokens
// are packed in the core's strips over the whole depth, the blocks of one row of the grid one after
// another, as [two strips][block][strip][item][lane], so that a register tile runs through all
// blocks of its row: its sums stay in registers, and only where the tokens' items begin jumps from
// block to block. Blocks are packed in the call: each is read once anyway. Up to four tokens are
// bound by how fast the blocks come from memory; these are then read where they lie, in order.
//
// An element is summed block by block, in parts of some hundred items, each from zero.
// dvalues go over the tokens in parts, in float32. Nothing depends on the number of threads.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/dropout.inl.hpp"
#include "cpu/gemm.inl.hpp"
// After the core:
#include "cpu/prune/blocks.inl.hpp"
// After the blocks:
#include "cpu/prune/few_tokens.inl.hpp"
#include "cpu/prune/gradient.inl.hpp"

namespace {

// ---- y and dX ------------------------------------------------------------------------------

// Items of depth that are summed up from zero, of floats. A dense product has kDepthItems, most of
// them zero: of blocks alone that many would be summed up less accurately.
constexpr int64_t kSumItems = 128;
// Packed blocks above this are made in parts.
constexpr int64_t kBlockBytes = int64_t(48) << 20;
// Packed tokens that stay in the second-level cache while blocks pass by.
constexpr int64_t kTokenBytes = int64_t(512) << 10;
// Tasks of a thread: one that another process holds up leaves them to the others.
constexpr int64_t kTasks = 6;

// The blocks of one row of the grid.
inline void pack_group(const BlockSide& w, Operand block, int64_t group, float* to) {
  const int64_t count = w.count(group), lines = w.lines_of(group);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t entry = w.offsets[group] + i;
    block.data = w.data(entry);
    for (int64_t line = 0, strip = 0; line < lines; line += kLanes, ++strip) {
      // The strips before its pair, then the blocks before it in the pair.
      const int64_t first = strip / 2 * 2, width = lesser(2, w.strips() - first);
      float* const at = to + (first * count + i * width + strip - first) * w.items() * kLanes;
      block.pack(block, line, int(lesser(kLanes, lines - line)), 0, w.values_of(entry), at);
    }
  }
}

// Rows of the grid [g0, g1), packed from `panel` on.
inline void pack_groups(const BlockSide& w, int64_t g0, int64_t g1, float* panel, int threads) {
  Operand block = dense(w.values, w.line_stride, w.depth_stride);
  choose_packer(block, w.dtype, w.pairs);
  const int64_t tasks = lesser(g1 - g0, 8 * threads);
  parallel_for(threads, tasks, [&](int64_t task, int) {
    for (int64_t g = g0 + task; g < g1; g += tasks)
      pack_group(w, block, g, panel + (w.offsets[g] - w.offsets[g0]) * w.packed());
  });
}

// Strips [s0, s1) of the tokens, whose panel that is, times one row of the grid.
inline void multiply_group(const BlockSide& w, const Strips& tokens, const float* token_panel,
                           const float* panel, int64_t group, int64_t s0, int64_t s1,
                           const Result& c) {
  const int64_t items = ceil_div(w.depth, w.per_item()), lines = w.lines_of(group);
  const int64_t count = w.count(group);
  const int64_t together = greater(1, (w.pairs ? kDepthItems : kSumItems) / w.items());
  const int32_t* const places = w.places + w.offsets[group];
  for (int64_t line = 0, first = 0; line < lines; line += kTileColumns, first += 2) {
    const int64_t width = lesser(2, w.strips() - first), strip_floats = w.items() * kLanes;
    const float* const columns = panel + first * count * strip_floats;
    for (int64_t s = s0; s < s1; ++s) {
      float tile[kTileRows * kTileColumns];
      const auto multiply = choose_block_tile(tokens.lines(s), width, w.pairs);
      for (int64_t i = 0; i < greater(count, 1); i += together)
        multiply(token_panel + (s - s0) * items * kLanes, columns + i * width * strip_floats,
                 strip_floats, width * strip_floats,
                 {places + i, lesser(together, count - i), w.items(), items}, tile, i > 0);
      c.store(c, tile, kTileColumns, tokens.line(s), w.line(group) + line, tokens.lines(s),
              int(lesser(kTileColumns, lines - line)));
    }
  }
}

// c = tokens W^T over rows of the grid [g0, g1), whose blocks are packed.
inline void multiply_groups(const BlockSide& w, const Operand& x, int64_t m, int64_t g0, int64_t g1,
                            const float* panel, const Result& c, int threads) {
  const int64_t items = greater(1, ceil_div(w.depth, w.per_item()));
  const Depth whole{w.depth, w.pairs, items};
  const Strips tokens{0, m, block_height(m)};
  const int64_t strips = tokens.count(), strip_floats = items * kLanes;
  const int64_t most = greater(1, kTokenBytes / (strip_floats * int64_t(sizeof(float))));
  // Parts of the tokens, as many for one thread as for another and packed where they are used.
  // Where there are few, also the rows of the grid in parts that have about as many blocks each,
  // for which the tokens are packed before.
  const int64_t wanted = threads == 1 ? 1 : kTasks * threads;
  int64_t parts = greater(ceil_div(strips, most), strips < wanted ? threads : wanted);
  parts = lesser(strips, ceil_div(parts, threads) * threads);
  const int64_t across = parts >= wanted ? 1 : lesser(g1 - g0, ceil_div(wanted, parts));
  const int64_t panels = across > 1 ? 1 : threads;
  const int64_t own = across > 1 ? strips : ceil_div(strips, parts);
  float* const token_panels = static_cast<float*>(
      scratch(Scratch::kRowPanels, panels * own * strip_floats * int64_t(sizeof(float))));
  if (across > 1) {
    const Packing packing{x, whole, token_panels};
    pack_panels(&packing, 1, tokens, threads);
  }
  parallel_for(threads, parts * across, [&](int64_t task, int worker) {
    const int64_t part = task / across, s0 = part * strips / parts;
    const int64_t s1 = (part + 1) * strips / parts;
    float* const mine = token_panels + (across > 1 ? s0 : worker * own) * strip_floats;
    if (across == 1) pack_strips(x, whole, tokens, s0, s1, 0, whole.items(), mine);
    int64_t seen = 0;
    for (int64_t i = 0; i < w.groups(); ++i) {
      const int64_t group = w.order[i];
      if (group < g0 || group >= g1 || seen++ % across != task % across) continue;
      multiply_group(w, tokens, mine, panel + (w.offsets[group] - w.offsets[g0]) * w.packed(),
                     group, s0, s1, c);
    }
  });
}

inline void multiply_many(const BlockSide& w, Operand x, int64_t m, const Result& c, int threads) {
  choose_packer(x, w.dtype, w.pairs);
  const int64_t block_bytes = w.packed() * int64_t(sizeof(float));
  const int64_t most = greater(1, kBlockBytes / block_bytes), groups = w.groups();
  for (int64_t g0 = 0, g1; g0 < groups; g0 = g1) {
    g1 = g0 + 1;
    while (g1 < groups && w.offsets[g1 + 1] - w.offsets[g0] <= most) ++g1;
    float* const panel = static_cast<float*>(
        scratch(Scratch::kColumnPanels, (w.offsets[g1] - w.offsets[g0] + 1) * block_bytes));
    pack_groups(w, g0, g1, panel, threads);
    multiply_groups(w, x, m, g0, g1, panel, c, threads);
  }
}

// c (m, lines) = x (m, depth) W^T.
inline void multiply_blocks(const BlockSide& w, const Operand& x, int64_t m, const Result& c,
                            int threads) {
  if (!m || !w.lines) return;
  const int64_t entries = w.offsets[w.groups()];
  if (m * entries * w.area < kSerialWork) threads = 1;
  if (m > kFewRows)
    multiply_many(w, x, m, c, threads);
  else if (w.dtype == FT_FLOAT32)
    multiply_few<float, false>(w, x, int(m), c, threads);
  else if (w.dtype == FT_FLOAT16)
    multiply_few<fp16, false>(w, x, int(m), c, threads);
  else
    w.pairs ? multiply_few<bf16, FT_BF16_DOT>(w, x, int(m), c, threads)
            : multiply_few<bf16, false>(w, x, int(m), c, threads);
}

// ---- the op --------------------------------------------------------------------------------

inline void forward(const BlockSparseLinear& f) {
  const ScratchScope scope;
  Result y = result(f.y, f.dtype, f.n, 1);
  y.bias = f.bias;
  multiply_blocks(side_of(f, false), dense(f.x, f.x_stride_m, f.x_stride_k), f.m, y, f.threads);
}

inline void backward(const BlockSparseLinear& f) {
  const ScratchScope scope;
  if (f.dx)
    multiply_blocks(side_of(f, true), dense(f.grad, f.grad_stride_m, f.grad_stride_n), f.m,
                    result(f.dx, f.dtype, f.k, 1), f.threads);
  if (f.dvalues) block_gradient(f, side_of(f, false), f.threads);
  if (f.dbias)
    sum_rows(dense(f.grad, f.grad_stride_n, f.grad_stride_m), f.m, f.n, f.dbias, f.dtype,
             f.threads);
}

constexpr PruneKernels kPrune{forward, backward};

}  // namespace

// A few tokens through all blocks of a GPT-2 on a CPU, and to logits: what Python calls.
//
// Plain loops, which the compiler turns into the machine's own instructions. In one call all threads of a team run through the
// same steps, and share the work of each. What is computed for a row, down to the order of every sum, depends on that row and
// its text alone, not on the rows beside it.

#include <functional>
#include <numeric>
#include <queue>

#include "attend.h"

// The structures that Python fills in, with those of the other files; their order is that of model/native.py.

struct Layer {
    Norm attn_norm;
    Linear qkv, output;
    Norm mlp_norm;
    const Linear *router, *up, *down;  // a router where there are experts, and of each expert the others
    int64_t num_experts, experts_per_token;
    int64_t heads, kv_heads, dim, window;  // window 0: none
    int64_t activation, qk_norm;
    float qk_eps;
};

namespace {

constexpr int64_t PIECE = 256;  // numbers of a row that a thread takes at once

void activate_rows(Team& team, const Layer& layer, int64_t expert, const float* x, float* y, int64_t rows) {
    const int64_t width = layer.down[expert].in, pieces = (width + PIECE - 1) / PIECE;
    team.share(rows * pieces, [&](int64_t each) {
        const int64_t row = each / pieces, at = each % pieces * PIECE;
        const float* const from = x + row * layer.up[expert].out + at;
        activate(layer.activation, from, y + row * width + at, std::min(PIECE, width - at), width);
    });
}

// The experts of one token and what each counts: the largest of its logits, and their softmax.
struct Choice {
    std::vector<int64_t> experts;
    std::vector<float> weights;

    Choice(const float* logits, int64_t num_experts, int64_t count) : experts(num_experts), weights(count) {
        std::iota(experts.begin(), experts.end(), 0);
        std::stable_sort(experts.begin(), experts.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
        float total = 0;
        for (int64_t i = 0; i < count; ++i) total += weights[i] = exponential(logits[experts[i]] - logits[experts[0]]);
        for (float& weight : weights) weight /= total;
    }
};

}  // namespace

extern "C" {

// x (rows, embed) goes through the layers, in place. The rows of a text stand together, `counts` of each; what is read is
// appended to its rooms, (layer, text). cos and sin (rows, dim / 2) turn queries and keys; null: nothing does.
void run_layers(const Layer* layers, int64_t num_layers, float* x, int64_t rows, int64_t embed, const Room* rooms,
                int64_t texts, const int64_t* counts, const float* cos, const float* sin) {
    int64_t widest = embed, hidden = embed, longest = 0;
    for (const Layer* layer = layers; layer < layers + num_layers; ++layer) {
        widest = std::max({widest, layer->output.in, layer->down->in, layer->num_experts});
        hidden = std::max({hidden, layer->qkv.out, layer->up->out});
    }
    std::vector<int64_t> text_of, place;  // of each row
    for (int64_t text = 0; text < texts; ++text) {
        for (int64_t i = 0; i < counts[text]; ++i) text_of.push_back(text), place.push_back(i);
        for (int64_t layer = 0; layer < num_layers; ++layer)
            longest = std::max(longest, rooms[layer * texts + text].held + counts[text]);
    }
    Quantised eight(rows, widest);
    std::vector<float> normed(rows * embed), narrow(rows * widest), wide(rows * hidden);
    float *const a = narrow.data(), *const b = wide.data();
    Team team;
#pragma omp parallel
    {
        std::vector<float> scores(longest);
        for (const Layer* layer = layers; layer < layers + num_layers; ++layer) {
            const int64_t heads = layer->heads, kv_heads = layer->kv_heads, dim = layer->dim;
            const Room* const its = rooms + (layer - layers) * texts;
            const Norm unit = {nullptr, nullptr, 0, layer->qk_eps};
            norm_rows(team, layer->attn_norm, x, normed.data(), rows, embed);
            linear(team, layer->qkv, normed.data(), b, rows, false, eight);
            team.share(rows, [&](int64_t row) {
                float* const q = b + row * layer->qkv.out;
                const Room& room = its[text_of[row]];
                for (int64_t head = 0; head < heads + kv_heads; ++head) {
                    float* const vector = q + head * dim;
                    if (layer->qk_norm) norm(unit, vector, vector, dim);
                    if (cos) rotate(vector, cos + row * (dim / 2), sin + row * (dim / 2), dim / 2);
                }
                for (int64_t head = 0; head < kv_heads; ++head) {
                    const int64_t slot = head * room.slots + room.held + place[row];
                    keep(q + (heads + head) * dim, room.keys, room.key_scales, room.kept_in, slot, dim);
                    keep(q + (heads + kv_heads + head) * dim, room.values, room.value_scales, room.kept_in, slot, dim);
                }
            });
            team.share(rows * heads, [&](int64_t each) {
                const int64_t row = each / heads, head = each % heads;
                const Room& room = its[text_of[row]];
                const int64_t end = room.held + place[row] + 1;
                const int64_t begin = layer->window ? std::max<int64_t>(0, end - layer->window) : 0;
                const auto way = room.kept_in == FLOAT32 ? attend<float>
                                 : room.kept_in == INT8  ? attend<int8_t>
                                                         : attend<uint16_t>;
                way(b + row * layer->qkv.out + head * dim, room, head / (heads / kv_heads), begin, end, dim, scores.data(),
                    a + each * dim);
            });
            linear(team, layer->output, a, x, rows, true, eight);
            norm_rows(team, layer->mlp_norm, x, normed.data(), rows, embed);
            if (!layer->router) {
                linear(team, *layer->up, normed.data(), b, rows, false, eight);
                activate_rows(team, *layer, 0, b, a, rows);
                linear(team, *layer->down, a, x, rows, true, eight);
                continue;
            }
            linear(team, *layer->router, normed.data(), a, rows, false, eight);
            std::vector<Choice> choices;  // every thread makes them for itself
            for (int64_t row = 0; row < rows; ++row)
                choices.emplace_back(a + row * layer->num_experts, layer->num_experts, layer->experts_per_token);
            team.meet();
            for (int64_t row = 0; row < rows; ++row) {
                for (int64_t i = 0; i < layer->experts_per_token; ++i) {
                    const int64_t expert = choices[row].experts[i];
                    linear(team, layer->up[expert], &normed[row * embed], b, 1, false, eight);
                    activate_rows(team, *layer, expert, b, a, 1);
                    linear(team, layer->down[expert], a, b, 1, false, eight);
                    team.share(embed, [&](int64_t j) { x[row * embed + j] += choices[row].weights[i] * b[j]; });
                }
            }
        }
    }
}

// y (rows, out) = norm(x) @ weight.T + bias; without a norm where that is null.
void project(const Norm* before, const Linear* f, const float* x, float* y, int64_t rows) {
    Quantised eight(f->scale ? rows : 0, f->in);
    std::vector<float> normed(before ? rows * f->in : 0);
    Team team;
#pragma omp parallel
    {
        if (before) norm_rows(team, *before, x, normed.data(), rows, f->in);
        linear(team, *f, before ? normed.data() : x, y, rows, false, eight);
    }
}

// The same of floats, but for numbers that are not among a row's `most` largest, which may be -infinity.
//
// `rough` is the layer in eight bits, without a bias; `changed` (out) how far its rows of weights are from the true ones, and
// `sizes` (out) how long they are. By Cauchy and Schwarz a product is then off by no more than
// changed * |x| + sizes * |x - what is left of it in eight bits|, and where it is too far below the others for that to
// matter, a quarter of the weights was enough to know.
void project_largest(const Norm* before, const Linear* f, const Linear* rough, const float* changed, const float* sizes,
                     const float* x, float* y, int64_t rows, int64_t most) {
    const int64_t in = f->in, out = f->out;
    std::vector<float> normed(rows * in), lengths(rows), losses(rows), least(rows);
    Quantised eight(rows, in);
    Team team;
#pragma omp parallel
    {
        norm_rows(team, *before, x, normed.data(), rows, in);
        linear(team, *rough, normed.data(), y, rows, false, eight);
        const auto off = [&](int64_t row, int64_t o) { return changed[o] * lengths[row] + sizes[o] * losses[row]; };
        team.share(rows, [&](int64_t row) {
            float all = 0, lost = 0;
            for (int64_t i = 0; i < in; ++i) {
                const float number = normed[row * in + i];
                const float left = number - (eight.low[row] + eight.step[row] * eight.of(row, in)[i]);
                all += number * number, lost += left * left;
            }
            lengths[row] = std::sqrt(all), losses[row] = std::sqrt(lost);
            std::priority_queue<float, std::vector<float>, std::greater<>> largest;  // what so many are sure to reach
            for (int64_t o = 0; o < out; ++o) {
                const float sure = y[row * out + o] - off(row, o);
                if (static_cast<int64_t>(largest.size()) < most) {
                    largest.push(sure);
                } else if (sure > largest.top()) {
                    largest.pop(), largest.push(sure);
                }
            }
            least[row] = largest.top();
        });
        team.share(out, [&](int64_t o) {
            for (int64_t row = 0; row < rows; ++row) {
                float& to = y[row * out + o];
                // Where anything is NaN, it is computed.
                const bool surely_less = to + off(row, o) < least[row];
                to = surely_less ? -INFINITY : product(static_cast<const float*>(f->weight) + o * in, &normed[row * in], in);
            }
        });
    }
}
}

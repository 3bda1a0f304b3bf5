// What is done to one row at a time between matrices: norms, rotary positions, activations.
#pragma once
#include <algorithm>

#include "floats.h"
#include "step.h"

namespace bessemer {

// What `work(channel, count)` does to every `count` ≤ 16 channels of a row.
template <class Work>
inline void each_lanes(int64_t width, Work&& work) {
    for (int64_t channel = 0; channel < width; channel += LANES) work(channel, std::min(LANES, width - channel));
}

inline void norm_row(const Norm& norm, const float* from, int64_t width, float* to) {
    if (norm.kind == NO_NORM) {
        if (to != from) std::copy(from, from + width, to);
        return;
    }
    float mean = 0.0f;
    if (norm.kind == LAYER_NORM) {
        Floats sum = zero_floats();
        each_lanes(width, [&](int64_t channel, int64_t count) { sum = sum + load_floats(from + channel, count); });
        mean = sum_of(sum) / float(width);
    }
    const Floats middle = broadcast(mean);
    Floats squares = zero_floats();
    each_lanes(width, [&](int64_t channel, int64_t count) {
        const Floats centred = between(0, count, load_floats(from + channel, count) - middle, zero_floats());
        squares = fma(centred, centred, squares);
    });
    const Floats factor = broadcast(1.0f / std::sqrt(sum_of(squares) / float(width) + norm.eps));
    each_lanes(width, [&](int64_t channel, int64_t count) {
        Floats scaled = (load_floats(from + channel, count) - middle) * factor * load_floats(norm.weight + channel, count);
        if (norm.kind == LAYER_NORM && norm.bias) scaled = scaled + load_floats(norm.bias + channel, count);
        store_floats(to + channel, scaled, count);
    });
}

// Turns one head by the angles of its position, in place.
inline void rotate_head(const Rotation& rotation, int64_t position, float* head) {
    const float *cosine = rotation.cosines + position * rotation.width, *sine = rotation.signed_sines + position * rotation.width;
    if (rotation.interleaved) {
        for (int64_t channel = 0; channel < rotation.width; channel += 2) {
            const float first = head[channel], second = head[channel + 1];
            head[channel] = fused(second, sine[channel], first * cosine[channel]);
            head[channel + 1] = fused(first, sine[channel + 1], second * cosine[channel + 1]);
        }
        return;
    }
    const int64_t half = rotation.width / 2;
    each_lanes(half, [&](int64_t channel, int64_t count) {
        const Floats first = load_floats(head + channel, count), second = load_floats(head + half + channel, count);
        auto turned = [&](int64_t place, Floats own, Floats partner) {
            return fma(partner, load_floats(sine + place, count), own * load_floats(cosine + place, count));
        };
        store_floats(head + channel, turned(channel, first, second), count);
        store_floats(head + half + channel, turned(half + channel, second, first), count);
    });
}

inline Floats activated(Activation activation, Floats x) {
    const Floats half = broadcast(0.5f), one = broadcast(1.0f);
    switch (activation) {
        case SILU: return x * sigmoid(x);
        case GELU: return half * x * (one + error_function(x * broadcast(0.70710678f)));
        case GELU_TANH: {
            const Floats inner = broadcast(0.79788456f) * fma(broadcast(0.044715f), x * x * x, x);
            return half * x * (one + hyperbolic_tangent(inner));
        }
        default: return larger(x, zero_floats());
    }
}

// gate = act(gate) · up, or up = act(up) where there is no gate; returns where the result lies.
inline void activate_row(Activation activation, float* gate, float* up, int64_t width) {
    each_lanes(width, [&](int64_t channel, int64_t count) {
        if (gate) {
            const Floats open = activated(activation, load_floats(gate + channel, count));
            store_floats(gate + channel, open * load_floats(up + channel, count), count);
        } else {
            store_floats(up + channel, activated(activation, load_floats(up + channel, count)), count);
        }
    });
}

inline void add_row(float* to, const float* from, int64_t width, float multiplier) {
    const Floats factor = broadcast(multiplier);
    each_lanes(width, [&](int64_t channel, int64_t count) {
        store_floats(to + channel, load_floats(to + channel, count) + load_floats(from + channel, count) * factor, count);
    });
}

}  // namespace bessemer

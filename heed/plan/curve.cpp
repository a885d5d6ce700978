#include "heed/plan/curve.h"

#include <cstdlib>

namespace heed {
namespace {

using Vector = std::array<Index, 3>;

Vector operator+(const Vector& x, const Vector& y) { return {x[0] + y[0], x[1] + y[1], x[2] + y[2]}; }
Vector operator-(const Vector& x, const Vector& y) { return {x[0] - y[0], x[1] - y[1], x[2] - y[2]}; }
Vector operator-(const Vector& x) { return {-x[0], -x[1], -x[2]}; }

// Vectors here lie along one axis.
Index size(const Vector& x) { return std::abs(x[0] + x[1] + x[2]); }
Vector unit(const Vector& x) {
  const auto sign = [](Index i) -> Index { return (i > 0) - (i < 0); };
  return {sign(x[0]), sign(x[1]), sign(x[2])};
}
// About half of it, of even length where it can be: even boxes are entered and left at corners of one edge.
Vector half(const Vector& x) {
  const Vector h{x[0] / 2, x[1] / 2, x[2] / 2};
  return size(h) % 2 == 1 && size(x) > 2 ? h + unit(x) : h;
}

class Curve {
 public:
  explicit Curve(const Extents& length) : length_(length) {
    order_.reserve(static_cast<size_t>(volume(length)));
    // The longest axis is the one to travel along.
    size_t longest = 2;
    for (size_t a = 2; a-- > 0;)
      if (length[a] > length[longest]) longest = a;
    std::array<Vector, 3> axes{};
    axes[0][longest] = length[longest];
    for (size_t a = 3, next = 1; a-- > 0;)
      if (a != longest) axes[next++][a] = length[a];
    walk({}, axes[0], axes[1], axes[2]);
  }
  std::vector<std::int32_t> order() && { return std::move(order_); }

 private:
  void visit(const Vector& p) {
    order_.push_back(static_cast<std::int32_t>((p[0] * length_[1] + p[1]) * length_[2] + p[2]));
  }

  // Visits the box that a, b and c span at corner p: from p to the corner at the other end of a.
  void walk(Vector p, const Vector& a, const Vector& b, const Vector& c) {
    const Index w = size(a), h = size(b), d = size(c);
    const Vector da = unit(a), db = unit(b), dc = unit(c);
    if ((w > 1) + (h > 1) + (d > 1) <= 1 || w * h * d == 0) {  // a line, or nothing
      const Vector step = w > 1 ? da : h > 1 ? db : dc;
      for (Index i = 0; i < w * h * d; ++i, p = p + step) visit(p);
      return;
    }
    const Vector a2 = half(a), b2 = half(b), c2 = half(c);
    if (2 * w > 3 * h && 2 * w > 3 * d) {  // long: two boxes one after the other
      walk(p, a2, b, c);
      walk(p + a2, a - a2, b, c);
    } else if (3 * h > 4 * d) {  // flat: up beside the start, across, down at the end; c stays whole
      walk(p, b2, c, a2);
      walk(p + b2, a, b - b2, c);
      walk(p + (a - da) + (b2 - db), -b2, c, -(a - a2));
    } else if (3 * d > 4 * h) {  // the same with b and c in each other's place
      walk(p, c2, a2, b);
      walk(p + c2, a, b, c - c2);
      walk(p + (a - da) + (c2 - dc), -c2, -(a - a2), b);
    } else {  // out along b, over along c, across along a, back along c, in along b
      walk(p, b2, c2, a2);
      walk(p + b2, c, a2, b - b2);
      walk(p + (b2 - db) + (c - dc), a, -b2, -(c - c2));
      walk(p + (a - da) + b2 + (c - dc), -c, -(a - a2), b - b2);
      walk(p + (a - da) + (b2 - db), -b2, c2, -(a - a2));
    }
  }

  Extents length_;
  std::vector<std::int32_t> order_;
};

}  // namespace

std::vector<std::int32_t> gilbert_order(const Extents& length) { return Curve(length).order(); }

std::vector<std::int32_t> inverse(std::span<const std::int32_t> order) {
  std::vector<std::int32_t> rank(order.size());
  for (size_t i = 0; i < order.size(); ++i) rank[static_cast<size_t>(order[i])] = static_cast<std::int32_t>(i);
  return rank;
}

}  // namespace heed

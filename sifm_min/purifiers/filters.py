"""The two filters of AdverseCleaner, on values (C,H,W) from 0 to 255, with gradients.

The weights of the bilateral filter depend on the picture too. Its gradient holds them fixed: it is that of the linear filter
that the picture got. The gradient of the guided filter is whole, by its input and by its guide.
"""

import numpy as np
import torch


def bilateral(values, diameter, sigma_colour, sigma_space):
    """The bilateral filter (Tomasi and Manduchi 1998) of values (C,H,W), with the conventions of OpenCV.

        y(p) = sum_q w(p,q) x(q) / sum_q w(p,q),   w(p,q) = exp(-|p-q|^2 / 2 sigma_space^2) exp(-d(p,q)^2 / 2 sigma_colour^2)

    d is the sum over channels of the absolute differences. q runs over the disc of this diameter. Edges are mirrored without
    repeating the last pixel.
    """
    radius = diameter // 2
    return _Bilateral.apply(_mirrored(values, radius), radius, sigma_colour, sigma_space)


class _Bilateral(torch.autograd.Function):
    """Padded values -> filtered values. Only the padded values are kept: the weights are computed again for the gradient."""

    @staticmethod
    def forward(ctx, padded, radius, sigma_colour, sigma_space):
        total = torch.zeros_like(_windows(padded, radius)[0])
        weights = torch.zeros_like(total[:1])
        for neighbour, weight in _neighbours(padded, radius, sigma_colour, sigma_space):
            total.addcmul_(weight, neighbour)
            weights.add_(weight)
        ctx.save_for_backward(padded, weights)
        ctx.settings = radius, sigma_colour, sigma_space
        return total / weights

    @staticmethod
    def backward(ctx, gradient):
        padded, weights = ctx.saved_tensors
        gradient, back = gradient / weights, torch.zeros_like(padded)
        receivers = _windows(back, ctx.settings[0])
        for receiver, (_, weight) in zip(receivers, _neighbours(padded, *ctx.settings), strict=True):
            receiver.addcmul_(weight.expand_as(gradient), gradient)
        return back, None, None, None


def _neighbours(padded, radius, sigma_colour, sigma_space):
    """(x(q), w(p,q)) for each place q around p, at all p: (C,H,W) and (1,H,W)."""
    height, width = (side - 2 * radius for side in padded.shape[1:])
    centre = padded[:, radius:radius + height, radius:radius + width]
    for (dy, dx), neighbour in zip(_places(radius), _windows(padded, radius), strict=True):
        distance = (neighbour - centre).abs_().sum(0, keepdim=True)
        near = (dy ** 2 + dx ** 2) / (2 * sigma_space ** 2)
        yield neighbour, distance.square_().mul_(-1 / (2 * sigma_colour ** 2)).sub_(near).exp_()


def _places(radius):
    """The offsets (dy, dx) of a disc."""
    reach = range(-radius, radius + 1)
    return [(dy, dx) for dy in reach for dx in reach if dy ** 2 + dx ** 2 <= radius ** 2]


def _windows(padded, radius):
    """Views (C,H,W) of padded values, one for each of `_places`."""
    height, width = (side - 2 * radius for side in padded.shape[1:])
    return [padded[:, radius + dy:radius + dy + height, radius + dx:radius + dx + width] for dy, dx in _places(radius)]


class Guide:
    """The guided filter (He, Sun and Tang 2013) by a colour guide (3,H,W): in each window of (2 radius + 1)^2 pixels the
    input is fitted linearly to the guide, eps holding the slopes down, and each pixel takes the mean of its windows' fits.

        a = (cov(I, I) + eps)^-1 cov(I, p),   b = mean(p) - a^T mean(I),   q = mean(a)^T I + mean(b)      (equations 14 to 16)

    Double precision, since a variance is the small difference of two large numbers. Edges are mirrored with the last pixel.
    """

    def __init__(self, guide, radius, eps):
        self.guide, self.radius = guide.double(), radius
        self.mean = self._box(self.guide)
        outer = self._box((self.guide[:, None] * self.guide[None]).flatten(0, 1)).unflatten(0, (3, 3))
        covariance = (outer - self.mean[:, None] * self.mean[None]).permute(2, 3, 0, 1)
        self.inverse = torch.linalg.inv(covariance + eps * torch.eye(3).to(self.guide))

    def filter(self, values):
        """Filter values (3,H,W), each channel by itself."""
        dtype, values = values.dtype, values.double()
        mean = self._box(values)
        crossed = self._box((self.guide[:, None] * values[None]).flatten(0, 1)).unflatten(0, (3, 3))
        covariance = crossed - self.mean[:, None] * mean[None]                           # (guide channel, channel, H, W)
        slopes = torch.einsum("hwij,jchw->ichw", self.inverse, covariance)
        offset = mean - torch.einsum("ichw,ihw->chw", slopes, self.mean)
        slopes = self._box(slopes.flatten(0, 1)).unflatten(0, (3, 3))
        return (torch.einsum("ichw,ihw->chw", slopes, self.guide) + self._box(offset)).to(dtype)

    def _box(self, values):
        """The means of all windows, by differences of running sums."""
        taps = 2 * self.radius + 1
        for axis in (1, 2):
            side = values.shape[axis]
            places = torch.from_numpy(np.pad(np.arange(side), (self.radius + 1, self.radius), mode="symmetric"))
            sums = values.index_select(axis, places.to(values.device)).cumsum(axis)
            values = (sums.narrow(axis, taps, side) - sums.narrow(axis, 0, side)) / taps
        return values


def _mirrored(values, radius):
    """(C,H,W) with a mirrored border, also of pictures smaller than the border."""
    rows, columns = (torch.from_numpy(np.pad(np.arange(side), radius, mode="reflect")) for side in values.shape[1:])
    return values[:, rows][:, :, columns]

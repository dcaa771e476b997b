# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Is the suite able to fail? Errors that optimizers have had, planted one at a time, and the check that must see each.

A fault is a function that changes the package through pytest's `monkeypatch`; the check is an existing test, called
with its arguments. It has to pass on the package as it is and to fail with the fault in it.
"""

import math
import types

import pytest
import test_conformance as conformance
import test_conformance_more as more
import test_hazards as hazards
import test_hazards_adam as hazards_adam
import test_hazards_flags as hazards_flags
import test_options as options
import test_oracles as oracle_tests
import test_precision as precision_tests
import test_release as release_tests
import test_sharded_code as sharded_code
import test_sharding as sharding_tests
import torch

import hf_optim.optim_args
from hf_optim.core import base, checkpoint, pipeline, plan, precision, release, sharding
from hf_optim.core.base import Optimizer
from hf_optim.core.options import Option
from hf_optim.core.pipeline import View
from hf_optim.optim import adafactor, nadamw, sm3, smmf
from hf_optim.optim.adafactor import Adafactor
from hf_optim.optim.adalo import AdaLo
from hf_optim.optim.adamw import AdamW
from hf_optim.optim.am_sgd import AMSGD
from hf_optim.optim.amos import Amos
from hf_optim.optim.diffgrad import DiffGrad
from hf_optim.optim.muon import Muon
from hf_optim.optim.nsgda import NSGDA
from hf_optim.transforms import agc, cautious, cpr
from hf_optim.transforms.atan2 import Atan2
from hf_optim.transforms.cautious import Cautious
from hf_optim.transforms.cautious_decay import CautiousDecay
from hf_optim.transforms.centralize import Centralize
from hf_optim.transforms.coupled import Coupled
from hf_optim.transforms.decoupled import Decoupled
from hf_optim.transforms.eps import Eps
from hf_optim.transforms.lookahead import Lookahead
from hf_optim.transforms.normalize import Normalize
from hf_optim.transforms.softplus import Softplus
from hf_optim.transforms.stable_decay import StableDecay
from hf_optim.transforms.trust_ratio import TrustRatio


FAULTS = {}  # name -> (function that plants it, check, arguments of the check)
NOT_CAUGHT = {}  # name of a fault that no check sees -> why
SLOW = (  # they start processes
    "loss_not_averaged_over_ranks",
    "sums_of_the_model_not_reduced",
    "shards_with_equal_noise",
    "what_compiled_steps_send_not_reduced",
    "a_collective_for_every_tensor",
)
FAILURE = (Exception, pytest.fail.Exception)


def caught_by(check, *args, **kwargs):
    """Register a fault with the check that is to see it."""

    def add(plant):
        FAULTS[plant.__name__] = (plant, check, args, kwargs)
        return plant

    return add


def static(patch, owner, name, make):
    """Replace a static method by `make(the original)`."""
    patch.setattr(owner, name, staticmethod(make(getattr(owner, name))))


def method(patch, owner, name, make):
    """Replace a method or a function of a module by `make(the original)`."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def run(check, args, kwargs):
    torch.manual_seed(0)
    check(*args, **kwargs)


PASSED = []  # checks that have passed without a fault


def run_clean(check, args, kwargs):
    """The check passes on the package as it is; looked at once."""
    if (check, args, kwargs) not in PASSED:
        run(check, args, kwargs)
        PASSED.append((check, args, kwargs))


# ---- the formula of the step ---------------------------------------------------------------------------------------


@caught_by(hazards.test_adamw_equals_torch, torch.float64, 1e-14, 0.1)
def decay_after_update(patch):
    static(patch, Decoupled, "apply", lambda _: lambda p, c: c.h.weight_decay * (p - c.lr * c.u))


@caught_by(hazards.test_adamw_equals_torch, torch.float64, 1e-14, 0.1)
def decay_without_the_step_size(patch):
    static(patch, Decoupled, "apply", lambda _: lambda p, c: c.h.weight_decay * p / c.lr)


@caught_by(hazards_flags.test_coupled_decay_enters_the_moments)
def coupled_decay_left_out_of_the_moments(patch):
    static(patch, Coupled, "apply", lambda _: lambda g, c: g)


@caught_by(hazards.test_adamw_first_step_by_hand)
def bias_correction_one_step_late(patch):
    static(patch, AdamW, "scalars", lambda real: lambda t, h: real(t + 1, h))


@caught_by(hazards.test_adamw_equals_torch, torch.float64, 1e-14, 0.0)
def eps_inside_the_root(patch):
    static(patch, Eps, "apply", lambda _: lambda num, den, h: num / (den.square() + h.eps).sqrt())


@caught_by(hazards.test_adamw_equals_torch, torch.float64, 1e-14, 0.0)
def betas_swapped(patch):
    def make(real):
        return lambda g, p, s, h: real(g, p, s, View({**vars(h), "beta1": h.beta2, "beta2": h.beta1}))

    static(patch, AdamW, "update", make)


@caught_by(hazards_adam.test_amsgrad_denominator_never_falls)
def amsgrad_without_memory(patch):
    def make(real):
        def root(g, s, h):
            found = real(g, s, h)
            return s.v.sqrt() * h.debias2 if h.amsgrad else found

        return root

    static(patch, AdamW, "root", make)


@caught_by(hazards_adam.test_nadamw_first_step)
def momentum_schedule_one_step_early(patch):
    patch.setattr(nadamw, "products", lambda beta1, decay: [1.0])
    method(patch, nadamw, "schedule", lambda real: lambda t, beta1, decay: real(t + 400, beta1, decay))


@caught_by(hazards.test_adafactor_factors_the_two_longest_axes)
def factored_along_the_first_two_axes(patch):
    patch.setattr(adafactor, "two_largest", lambda shape: (0, 1))


@caught_by(oracle_tests.test_200_steps_in_float32, "adafactor_corrected")
def factored_mean_over_all_axes(patch):
    def factored(row, col, a, b):
        return row.rsqrt() * col.mean().sqrt(), col.rsqrt()

    patch.setattr(adafactor, "factored_rsqrt", factored)


@caught_by(oracle_tests.test_200_steps_in_float32, "adafactor_corrected")
def factored_product_not_divided_by_its_mean(patch):
    patch.setattr(adafactor, "factored_rsqrt", lambda row, col, a, b: (row.rsqrt(), col.rsqrt()))


@caught_by(hazards.test_adafactor_update_is_clipped)
def update_not_clipped(patch):
    patch.setattr(adafactor, "rms", lambda x: x.new_zeros(()))


@caught_by(hazards.test_adafactor_momentum_follows_the_schedule_at_once)
def learning_rate_inside_the_momentum(patch):
    def make(real):
        def update(g, p, s, h):
            u, lr = real(g, p, s, View({**vars(h), "beta1": None}))
            if h.beta1 is None:
                return u, lr
            s.m = s.m.lerp(lr * u, 1 - h.beta1)
            return s.m, 1.0

        return update

    static(patch, Adafactor, "update", make)


@caught_by(hazards.test_sm3_covers_the_sum_of_squares_and_no_more_than_the_first_variant)
def cover_by_the_largest_accumulator(patch):
    patch.setattr(sm3, "torch", types.SimpleNamespace(minimum=torch.maximum, where=torch.where))


@caught_by(oracle_tests.test_200_steps_in_float32, "smmf")
def signs_unpacked_in_reverse(patch):
    method(patch, smmf, "with_signs", lambda real: lambda size, packed: real(size, packed.flip(-1)))


@caught_by(hazards.test_nsgda_moves_by_lr, 1.0)
def norm_of_the_gradient_in_place_of_the_momentum(patch):
    def update(g, p, s, h):
        s.m = s.m.lerp(g, 1 - h.momentum)
        return s.m / (g.norm() + h.floor)

    static(patch, NSGDA, "update", lambda _: update)


@caught_by(hazards.test_amos_first_step, 1.0)
def amos_without_bias_correction(patch):
    static(patch, Amos, "scalars", lambda real: lambda t, h: real(t, h) | {"debias": 1.0})


@caught_by(hazards.test_amos_reads_eta_from_the_kind_of_module)
def kind_of_the_module_ignored(patch):
    static(patch, Amos, "options_for", lambda _: lambda at, h: {})


@caught_by(hazards_adam.test_muon_momentum_by_hand)
def nesterov_left_out(patch):
    static(patch, Muon, "update", lambda real: lambda g, p, s, h: real(g, p, s, View({**vars(h), "nesterov": False})))


@caught_by(hazards_adam.test_muon_original_scale)
def scale_of_the_transposed_matrix(patch):
    def make(real):
        def update(g, p, s, h):
            u = real(g, p, s, h)
            m, n = p.shape
            return u * (max(1, n / m) / max(1, m / n)) ** 0.5 if h.scale == "original" else u

        return update

    static(patch, Muon, "update", make)


@caught_by(hazards_adam.test_diffgrad_by_hand)
def previous_gradient_never_stored(patch):
    def make(real):
        def update(g, p, s, h):
            kept = s.g_prev
            u = real(g, p, s, h)
            s.g_prev = kept
            return u

        return update

    static(patch, DiffGrad, "update", make)


@caught_by(hazards_adam.test_am_sgd_minimises_the_larger_of_two_planes)
def squares_and_gap_exchanged(patch):
    def make(real):
        def measure(g, p, s, h):
            found = real(g, p, s, h)
            return {"squares": found["gap"], "gap": found["squares"]}

        return measure

    static(patch, AMSGD, "measure", make)


# ---- flags ---------------------------------------------------------------------------------------------------------


@caught_by(hazards.test_cautious_compares_signs_not_products)
def cautious_by_the_sign_of_the_product(patch):
    patch.setattr(cautious, "xorsign", lambda x, y: (x * y).sign())


@caught_by(hazards.test_cautious_does_not_blow_up_the_touched_rows_of_an_embedding)
def cautious_share_of_all_entries(patch):
    def apply(u, c):
        aligned = (u.sign() * c.g.sign() > 0).to(u.dtype)
        return u * aligned / aligned.mean().clamp(min=c.h.cautious_floor)

    static(patch, Cautious, "apply", lambda _: apply)


@caught_by(hazards_flags.test_cautious_leaves_decay_unmasked)
def cautious_mask_on_the_decay(patch):
    def apply(p, c):
        return c.h.weight_decay * p * (c.u.sign() * c.g.sign() > 0)

    static(patch, Decoupled, "apply", lambda _: apply)


@caught_by(hazards_flags.test_cautious_decay_adamw_by_hand)
def cautious_decay_where_the_step_grows_the_weight(patch):
    static(patch, CautiousDecay, "apply", lambda _: lambda p, c: c.h.weight_decay * p * (c.u * c.p < 0))


@caught_by(conformance.test_gradients_are_left_alone, "adamw", "fp64")
def gradient_changed_in_place(patch):
    def apply(x, c):
        return x.sub_(x.mean(tuple(range(1, x.ndim)), keepdim=True)) if x.ndim > 1 else x

    static(patch, Centralize, "apply", lambda _: apply)


@caught_by(hazards.test_centralize_leaves_units_of_one_weight_and_vectors_alone, "adamw", (7,))
def vectors_centralized(patch):
    static(patch, Centralize, "apply", lambda _: lambda x, c: x - x.mean())


@caught_by(hazards.test_centralize_keeps_the_mean_of_every_row, (6, 9))
def columns_centralized(patch):
    static(patch, Centralize, "apply", lambda _: lambda x, c: x - x.mean(0, keepdim=True))


@caught_by(hazards.test_lookahead_by_hand)
def lookahead_started_late(patch):
    def make(real):
        def scalars(t, h):
            found = real(t, h)
            return found | ({"lookahead_pull": 1.0} if t == h.lookahead_k else {})

        return scalars

    static(patch, Lookahead, "scalars", make)


@caught_by(hazards_flags.test_lamb_moves_a_matrix_by_lr_times_its_norm, 1.0, 0.1)
def trust_ratio_without_the_decay(patch):
    def apply(x, c):
        return x * c.p.norm() / (x - c.h.weight_decay * c.p).norm()

    static(patch, TrustRatio, "apply", lambda _: apply)


@caught_by(hazards_flags.test_lamb_vectors_keep_their_step)
def trust_ratio_of_vectors(patch):
    static(patch, TrustRatio, "apply", lambda real: lambda x, c: real(x.reshape(1, -1), c).reshape(x.shape))


@caught_by(hazards_flags.test_cpr_closed_recursion_at_lr_zero, "l2")
def half_the_slope_of_the_bound(patch):
    def make(real):
        def measure(p, kind):
            size, slope, shrunk = real(p, kind)
            return size, slope / 2, shrunk

        return measure

    method(patch, cpr, "measure", make)


@caught_by(hazards_flags.test_stable_decay_averages_over_all_groups)
def decay_by_the_moment_of_one_group(patch):
    def measure(c):
        c.rule.update(c.g, c.p, c.s, c.h)
        v = c.rule.second_moment(c.s, c.h)
        return {"stable_total": v.mean(), "stable_count": 1}

    static(patch, StableDecay, "measure", lambda _: measure)


@caught_by(hazards.test_atan2_of_large_b_is_adam)
def arguments_of_atan2_exchanged(patch):
    static(patch, Atan2, "apply", lambda _: lambda num, den, h: h.atan2_a * (h.atan2_b * den).atan2(num))


@caught_by(hazards_adam.test_softplus_of_large_beta_is_adam)
def sharpness_of_softplus_ignored(patch):
    static(patch, Softplus, "apply", lambda _: lambda num, den, h: num / torch.nn.functional.softplus(den))


@caught_by(hazards_flags.test_agc_closed_form, (6, 9))
def clipped_by_the_whole_tensor(patch):
    patch.setattr(agc, "unit_norm", lambda x: x.square().sum().sqrt())


@caught_by(hazards_flags.test_normalize_moves_a_tensor_by_lr, (6, 9))
def root_mean_square_in_place_of_the_norm(patch):
    static(patch, Normalize, "apply", lambda _: lambda g, c: g / g.square().mean().sqrt())


# ---- the engine ----------------------------------------------------------------------------------------------------


@caught_by(conformance.test_a_parameter_without_gradient_stands_still_in_time, "adamw")
def one_step_counter_for_all(patch):
    patch.setattr(plan.Call, "t", property(lambda call: call.group["step"] - 1))


def after_each_step(patch, then):
    def make(real):
        def step(self):
            real(self)
            for group in self.param_groups:
                for p in group["params"]:
                    then(self, group, p)

        return step

    method(patch, Optimizer, "_step", make)


@caught_by(conformance.test_a_parameter_without_gradient_stands_still_in_time, "adamw")
def weights_without_gradient_decay(patch):
    def then(optimizer, group, p):
        if p.grad is None:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    after_each_step(patch, then)


@caught_by(conformance.test_state_does_not_grow, "adamw")
def state_grows(patch):
    after_each_step(patch, lambda o, group, p: o.state[p].update({f"seen_{o.state[p]['step']}": torch.zeros(1)}))


@caught_by(conformance.test_a_parameter_without_gradient_stands_still_in_time, "adamw")
def plan_kept_although_gradients_went(patch):
    patch.setattr(plan.Plan, "current", lambda self, optimizer: True)


@caught_by(conformance.test_state_moved_to_other_storage_is_followed, "adamw")
def aliases_of_old_storage(patch):
    patch.setattr(plan, "watch", lambda items: lambda: True)


@caught_by(more.test_an_option_changed_in_the_group_acts_at_the_next_step, "adamw")
def options_of_the_first_step_kept(patch):
    def make(real):
        return lambda optimizer: [part for i, part in enumerate(real(optimizer)) if i % 3]

    method(patch, plan, "signature", make)


@caught_by(conformance.test_parameters_swapped_in_the_groups_are_the_ones_that_move, "adamw")
def parameters_of_the_constructor_kept(patch):
    def make(real):
        def add_param_group(self, group):
            real(self, group)
            self._first = list(self.parameters())

        return add_param_group

    method(patch, Optimizer, "add_param_group", make)
    patch.setattr(plan, "with_gradient", lambda o: [(i, 0, p) for i, p in enumerate(o._first) if p.grad is not None])


@caught_by(conformance.test_strides_change_nothing, "adamw", "transposed gradient")
def gradient_read_in_storage_order(patch):
    def gradient(item, elementwise):
        g = item.p.grad.detach()
        return plan.flatten(g) if item.flat else g.as_strided(g.shape, torch.empty(g.shape).stride())

    patch.setattr(plan.Item, "gradient", gradient)


@caught_by(conformance.test_a_first_step_of_size_zero_moves_nothing_but_the_state, "adamw", "fp32")
def empty_tensors_stepped(patch):
    def with_gradient(optimizer):
        return [(i, 0, p) for i, p in enumerate(optimizer.parameters()) if p.grad is not None]

    patch.setattr(plan, "with_gradient", with_gradient)


@caught_by(conformance.test_sparse_gradients_are_refused_by_name, "adamw")
def sparse_gradients_made_dense(patch):
    def make(real):
        def make_item(spec, p, state, index):
            if p.grad.layout != torch.strided:
                p.grad = p.grad.to_dense()
            return real(spec, p, state, index)

        return make_item

    method(patch, plan, "make_item", make)


@caught_by(more.test_no_gradient_is_kept_alive, "adamw")
def gradients_kept_alive(patch):
    def make(real):
        def make_item(spec, p, state, index):
            item = real(spec, p, state, index)
            item.first_gradient = p.grad
            return item

        return make_item

    method(patch, plan, "make_item", make)


@caught_by(conformance.test_the_learning_rate_of_the_group_counts, "adamw")
def learning_rate_of_the_constructor(patch):
    def make(real):
        return lambda self, call, scalars: real(self, call, scalars) | {"lr": self.defaults["lr"]}

    method(patch, Optimizer, "_values", make)


@caught_by(conformance.test_effective_lr, "adalo")
def effective_lr_is_that_of_the_group(patch):
    patch.setattr(Optimizer, "effective_lr", lambda self: self.param_groups[0]["lr"] if self._used else None)


def step_of_adamw(patch, make):
    method(patch, AdamW, "step", make)


@caught_by(conformance.test_closures_run_once_with_gradients_and_their_value_is_returned, "adamw")
def closure_without_gradients(patch):
    def step(self, closure=None, *, loss=None, scaler=None):
        with torch.no_grad():
            result = closure() if closure else None
            self._step()
        return result

    step_of_adamw(patch, lambda _: step)


@caught_by(more.test_what_a_closure_returns_is_returned_as_it_is, "adamw", "tensor")
def value_of_the_closure_dropped(patch):
    step_of_adamw(patch, lambda real: lambda self, *args, **kwargs: real(self, *args, **kwargs) and None)


@caught_by(conformance.test_a_loss_counts_for_one_step_only, "adalo")
def loss_used_twice(patch):
    def make(real):
        def step(self):
            loss = self._loss
            real(self)
            self._loss = loss

        return step

    method(patch, Optimizer, "_step", make)


@caught_by(conformance.test_a_skipped_step_leaves_no_trace, "adalo", "scaler.step")
def loss_of_a_skipped_step_counts(patch):
    def make(real):
        def report_loss(self, loss):
            real(self, loss)
            for group in self.param_groups:
                group["e"] = group["e"].lerp(1 / (2 + self._loss), 1 - group["beta2"])

        return report_loss

    method(patch, AdaLo, "report_loss", make)


@caught_by(hazards.test_adalo_survives_any_loss, wrong=math.nan, mode="adversarial")
def nan_enters_the_average_of_the_loss(patch):
    def prepare(s, h):
        s.e = s.e.lerp(1 / (2 + h.loss.clamp(min=0)), 1 - h.beta2)
        return {"eta": (s.e / h.kappa).clamp(min=h.eps)}

    static(patch, AdaLo, "prepare", lambda _: prepare)


@caught_by(hazards.test_adalo_has_one_average_for_all_groups)
def average_of_the_loss_starts_afresh_in_a_new_group(patch):
    def make(real):
        def add_param_group(self, group):
            real(self, group)
            self.param_groups[-1]["e"] = torch.tensor(0.0)

        return add_param_group

    method(patch, AdaLo, "add_param_group", make)


@caught_by(conformance.test_the_default_dtype_of_torch_does_not_matter, "adalo")
def scalars_in_the_default_dtype(patch):
    method(patch, AdaLo, "report_loss", lambda real: lambda self, loss: real(self, torch.tensor(float(loss))))


@caught_by(conformance.test_state_is_made_for_all_that_train_and_for_nothing_else, "adamw")
def state_made_at_the_first_gradient(patch):
    def materialize(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self.state:
                    self.state[p] = self._new_state(p, group)

    patch.setattr(Optimizer, "_materialize", materialize)


@caught_by(conformance.test_a_step_of_zero_gradients_and_zero_lr_only_makes_state, "adamw")
def asking_for_the_state_dict_counts_as_a_step(patch):
    patch.setattr(Optimizer, "_is_template_step", lambda self: False)


@caught_by(release_tests.test_the_weights_move_inside_backward, "adamw")
def released_gradient_thrown_away(patch):
    patch.setattr(release.Release, "_step", lambda self, part: None)


@caught_by(release_tests.test_released_steps_are_the_ordinary_steps, "adamw", "moved")
def released_aliases_of_old_storage(patch):
    patch.setattr(release, "watch", lambda items: lambda: True)


@caught_by(release_tests.test_accumulated_steps_are_the_ordinary_steps, "nsgda", "plain")
def absorbed_gradients_that_the_step_decays(patch):
    patch.setattr(NSGDA, "averages", staticmethod(lambda h: {"m": (1.0, 1 - h.momentum)}))


@caught_by(release_tests.test_accumulated_steps_are_the_ordinary_steps, "nsgda", "plain")
def no_step_without_a_gradient_in_the_last_micro_batch(patch):
    patch.setattr(release.Release, "finish", release.Release.forget)


@caught_by(release_tests.test_every_micro_batch_is_rounded_by_noise_of_its_own)
def micro_batches_that_share_their_noise(patch):
    absorb = release.absorb_tensor
    patch.setattr(release, "absorb_tensor", lambda *args: absorb(*args[:-1], 1))


@caught_by(hazards.test_nsgda_of_the_model_refuses_gradient_release)
def release_without_the_gradients_it_needs(patch):
    patch.setattr(release.Release, "_refuse", lambda self: None)


# ---- precision -----------------------------------------------------------------------------------------------------


@caught_by(oracle_tests.test_low_precision_gradients, "adamw", scale=1e-4, grad_dtype=torch.float16)
def gradient_squared_in_fp16(patch):
    def root(g, s, h):
        s.v = s.v.lerp(g.half().square().to(g.dtype), 1 - h.beta2)
        return s.v.sqrt() * h.debias2

    static(patch, AdamW, "root", lambda _: root)


@caught_by(conformance.test_state_has_the_dtypes_that_were_asked_for, "adamw")
def state_in_the_dtype_of_the_weight(patch):
    patch.setattr(precision, "state_dtype", lambda p, wanted: p.dtype)


@caught_by(precision_tests.test_bf16_state_follows_a_slow_average, "adamw")
def bf16_state_rounded_to_nearest(patch):
    def make(real):
        return lambda buffer, value, stochastic, *rest: real(buffer, value, False, *rest)

    method(patch, pipeline, "_store", make)


@caught_by(precision_tests.test_kahan_follows_a_thousand_steps_of_fp32)
def residual_thrown_away(patch):
    patch.setattr(precision, "write_kahan", lambda p, residual, value: p.copy_(value))


@caught_by(precision_tests.test_stochastic_rounding_goes_up_as_often_as_it_should, share=0.5, sign=1.0)
def always_rounded_towards_zero(patch):
    patch.setattr(precision, "noise_bits", lambda value, *_: torch.zeros(value.shape, dtype=torch.int32))


@caught_by(precision_tests.test_nan_and_inf_are_kept_and_nothing_finite_becomes_inf)
def rounded_up_to_infinity(patch):
    def write(buffer, value, noise=None):
        rounded = ((value.view(torch.int32) + noise) & -65536).view(torch.float32)
        buffer.copy_(torch.where(value.isfinite(), rounded, value))

    patch.setattr(precision, "write", write)


def salt_of(patch, make):
    method(patch, precision, "salt", lambda real: lambda seed, step, index: make(real, seed, step, index))


@caught_by(
    precision_tests.test_small_updates_add_up_under_kahan_and_on_average_under_stochastic_rounding, "adamw", False
)
def noise_of_every_step_equal(patch):
    salt_of(patch, lambda real, seed, step, index: real(seed, 0, index))


@caught_by(precision_tests.test_parameters_steps_and_elements_get_noise_of_their_own, "adamw")
def noise_of_every_parameter_equal(patch):
    salt_of(patch, lambda real, seed, step, index: real(seed, step, 0))


@caught_by(precision_tests.test_noise_depends_on_seed_step_and_position_only, "adamw")
def seed_of_the_noise_ignored(patch):
    salt_of(patch, lambda real, seed, step, index: real(0, step, index))


@caught_by(precision_tests.test_a_parameter_without_gradient_does_not_shift_the_noise_of_the_next, "adamw")
def noise_by_position_among_the_gradients(patch):
    def make(real):
        return lambda optimizer: ((i, position, p) for i, (_, position, p) in enumerate(real(optimizer)))

    method(patch, plan, "with_gradient", make)


@caught_by(conformance.test_no_random_numbers_are_drawn_from_torch, "adamw")
def random_numbers_of_torch(patch):
    patch.setattr(precision, "noise_bits", lambda x, *_: torch.randint(0, 2**16, x.shape, dtype=torch.int32))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def loading(patch, load):
    patch.setattr(checkpoint, "load", load)


@caught_by(conformance.test_save_load_continue_equals_going_on, "adamw", "bf16")
def state_cast_to_the_weight_on_load(patch):
    loading(patch, lambda optimizer, saved, torch_load: torch_load(saved))


@caught_by(conformance.test_a_loaded_dict_and_the_optimizer_share_nothing, "adamw")
def loaded_tensors_aliased(patch):
    def load(optimizer, saved, torch_load):
        torch_load(saved)
        for p, key, _ in checkpoint.saved(optimizer, saved):
            optimizer.state[p].update(saved["state"][key])

    loading(patch, load)


def before_loading(patch, first):
    def make(real):
        def load(optimizer, saved, torch_load):
            first(optimizer, saved, torch_load)
            real(optimizer, saved, torch_load)

        return load

    method(patch, checkpoint, "load", make)


@caught_by(conformance.test_loading_leaves_the_given_dict_alone, "adamw")
def defaults_written_into_the_given_dict(patch):
    def first(optimizer, saved, _):
        for group in saved["param_groups"]:
            group.setdefault("seed", 0)

    before_loading(patch, first)


@caught_by(conformance.test_checkpoints_of_other_models_are_refused_and_change_nothing, "adamw")
def checkpoint_looked_at_after_it_is_loaded(patch):
    before_loading(patch, lambda optimizer, saved, torch_load: torch_load(saved))


@caught_by(conformance.test_checkpoints_with_state_missing_or_left_over_are_refused, "adamw")
def checkpoint_not_looked_at(patch):
    patch.setattr(checkpoint, "check", lambda optimizer, saved: None)


@caught_by(conformance.test_load_hooks_run_and_the_dict_they_return_is_loaded, "adamw")
def hooks_of_loading_left_behind(patch):
    patch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda handle: None)


@caught_by(conformance.test_load_hooks_run_and_the_dict_they_return_is_loaded, "adamw")
def dict_of_the_load_hook_ignored(patch):
    def load(optimizer, saved, torch_load):
        torch_load(saved)
        for p, key, _ in checkpoint.saved(optimizer, saved):
            optimizer.state[p] = {k: v.clone() if hasattr(v, "clone") else v for k, v in saved["state"][key].items()}

    loading(patch, load)


@caught_by(conformance.test_an_older_pickle_gets_defaults_too, "adamw")
def new_options_missing_after_an_older_pickle(patch):
    patch.setattr(Optimizer, "__setstate__", torch.optim.Optimizer.__setstate__)


@caught_by(conformance.test_copies_continue_identically, "adamw", "pickle", "fp32")
def pickle_without_the_state(patch):
    method(patch, Optimizer, "__getstate__", lambda real: lambda self: {**real(self), "state": {}})


@caught_by(conformance.test_keys_of_checkpoints_are_frozen, "adamw")
def key_of_the_state_renamed(patch):
    static(patch, AdamW, "init", lambda real: lambda p, h: real(p, h) | {"exp_avg": base.sharding.like(p)})


# ---- options -------------------------------------------------------------------------------------------------------


@caught_by(options.test_unknown_options_are_refused_with_the_nearest_name_and_the_list, "adamw")
def unknown_options_swallowed(patch):
    real = Optimizer.resolve.__func__

    def resolve(cls, given, inherited=None):
        return real(cls, {k: v for k, v in given.items() if k in cls.options()}, inherited)

    patch.setattr(Optimizer, "resolve", classmethod(resolve))


def checking(patch, change):
    """`change(option, value)` returns what is checked in their place."""

    def make(real):
        def check(self, owner, value):
            option, value = change(self, value)
            return real(option, owner, value)

        return check

    method(patch, Option, "check", make)


@caught_by(options.test_bad_values_are_refused_at_construction_and_in_a_group, "adamw")
def infinity_accepted(patch):
    checking(patch, lambda o, v: (o, 1.0) if isinstance(v, float) and v == math.inf else (o, v))


@caught_by(options.test_bad_values_are_refused_at_construction_and_in_a_group, "adamw")
def open_end_of_a_range_included(patch):
    checking(patch, lambda o, v: (o, 0.5) if isinstance(v, float) and v == o.lt else (o, v))


@caught_by(options.test_bad_values_are_refused_at_construction_and_in_a_group, "adamw")
def numbers_read_from_strings(patch):
    checking(patch, lambda o, v: (o, float(v)) if isinstance(v, str) and v == "0.5" and o.type is float else (o, v))


@caught_by(options.test_settings_of_a_flag_that_is_off_are_refused, "adamw")
def settings_without_their_flag_accepted(patch):
    patch.setattr(Optimizer, "idle_host", classmethod(lambda cls, key, values: None))


@caught_by(options.test_a_group_overrides_the_optimizer, "adamw")
def options_of_a_group_ignored(patch):
    method(patch, Optimizer, "add_param_group", lambda real: lambda self, g: real(self, {"params": g["params"]}))


@caught_by(options.test_parameters_that_are_not_real_floating_point_are_refused, "adamw", torch.complex64)
def refused_parameters_stay_in_the_groups(patch):
    def make(real):
        def add_param_group(self, group):
            try:
                real(self, group)
            except ValueError:
                self.param_groups.append(group)
                raise

        return add_param_group

    method(patch, Optimizer, "add_param_group", make)


@caught_by(options.test_split_optim_args_names_what_it_cannot_read, "a=1,a=2", "`a` twice")
def option_given_twice_overwritten(patch):
    patch.setattr(hf_optim.optim_args, "_unique", dict)


# ---- several ranks -------------------------------------------------------------------------------------------------


@caught_by(sharding_tests.test_all_ranks_step_by_the_mean_of_their_losses, "adalo", 2)
def loss_not_averaged_over_ranks(patch):
    patch.setattr(sharding, "mean_over_ranks", lambda x: x)


@caught_by(sharding_tests.test_sharded_equals_whole, "am_sgd")
def sums_of_the_model_not_reduced(patch):
    patch.setattr(sharding, "whole", sharding.local)


@caught_by(sharding_tests.test_sharded_equals_whole, "adamw")
def shards_with_equal_noise(patch):
    patch.setattr(sharding, "flat_offset", lambda p: 0)


@caught_by(sharded_code.test_compiled_steps_of_shards_equal_whole_ones, "smmf")
def what_compiled_steps_send_not_reduced(patch):
    patch.setattr(sharding, "exchange", lambda collectives, tensors: tensors)


@caught_by(sharded_code.test_one_collective_serves_all_tensors_of_a_shape, "smmf")
def a_collective_for_every_tensor(patch):
    patch.setattr(sharding.Collective, "adds", False)


# ---- the tests -----------------------------------------------------------------------------------------------------


def test_there_are_enough_faults_and_nearly_all_are_caught():
    assert len(FAULTS) >= 40 and set(NOT_CAUGHT) <= set(FAULTS)
    assert len(NOT_CAUGHT) <= 0.05 * len(FAULTS), NOT_CAUGHT


@pytest.mark.parametrize(
    "fault", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FAULTS if n not in NOT_CAUGHT]
)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    plant, *check = FAULTS[fault]
    run_clean(*check)
    plant(monkeypatch)
    with pytest.raises(FAILURE) as excinfo:
        run(*check)
    assert excinfo.traceback[-1].path.name != "test_faults.py"  # the check has seen it; the fault itself did not break

"""The talk's experiments, one command each, run from the repository's root::

    python -m experiments.variance_networks    LeNet-5 and VGG-like: dropout against variance networks
    python -m experiments.parameterizations    one posterior per layer, neuron or weight, and the additive one
    python -m experiments.information_flow     zero means and permuted sigmas while a network becomes one of variances
    python -m experiments.toy                  a variance network in the plane: regions of its decisions
    python -m experiments.swa                  stochastic weight averaging against SGD at three budgets
    python -m experiments.curves               Bezier curves and chains between networks, and planes through them
    python -m experiments.width                how wide SWA's and SGD's optima are, on a line and along rays
    python -m experiments.variance_networks                        dropout against weights of mean zero, three schemes
    python -m experiments.parameterizations                        of variational dropout: ELBO and accuracies
    python -m experiments.information_flow                         from the means of weights to their variances
    python -m experiments.toy                                      four Gaussians told apart by two noisy neurons

``python -m experiments`` lists them. ``--data digits`` is the default and takes a minute or two on one CPU thread;
``--data cifar10 --root DIR`` and the like take the published settings and a GPU. Every command knows ``--help`` and
``--quick``, prints the published numbers beside its own, and writes its pictures and a record (JSON) to
``experiments_output/``, or ``--out``. One that was killed goes on where it was when it is called again. Several GPUs::

    torchrun --nproc-per-node 4 -m experiments.swa --data cifar100 --root DIR --model preresnet164
"""

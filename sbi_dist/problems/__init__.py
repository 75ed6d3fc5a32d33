"""Problems that come with the package, each a module with a ``problem``.

``sbi_dist.problems.coalescent:problem``
    Population growth from a site-frequency spectrum, simulated by msprime (extra ``coalescent``).
``sbi_dist.problems.gaussian:problem``
    Three shifted parameters with Gaussian noise: the amortized tutorial of the sbi toolbox. Its
    posterior is known in closed form.
``sbi_dist.problems.lynx_hare:problem``
    Lotka-Volterra dynamics of lynx and hare in the pelt counts of the Hudson's Bay Company,
    1900-1920. Its posterior is known from published Hamiltonian Monte Carlo.

Of the SBI benchmark (Lueckmann et al. 2021, arXiv:2101.04653), with reference posteriors by
``reference.load_reference``: ``bernoulli_glm``, ``gaussian_linear``, ``gaussian_linear_uniform``,
``gaussian_mixture``, ``lotka_volterra``, ``sir``, ``slcp``, ``slcp_distractors`` and ``two_moons``.
"""

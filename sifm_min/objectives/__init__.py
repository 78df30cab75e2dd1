"""The methods that came after SIFM, and what can be put around any method: each from its paper's formula.

    danp.py               DANP: attention maps and noise prediction together
    diffusionguard.py     DiffusionGuard: the noisiest step of an edit
    sifm_output.py        SIFM at the denoiser's output, with other choices where the paper has none
    decontext.py          DeContext: attention to a picture's reference tokens
    text_refinement.py    TDAE: the instruction moves against the perturbation; and TDAE as a whole
    flat_minima.py        TDAE: flat minima of any method's loss
    blurred.py            BlurGuard: the perturbation is blurred
"""

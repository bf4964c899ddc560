"Read settings.ini, compile `kernels/` if a compiler is there, and install."
import os, sys
from configparser import ConfigParser
from glob import glob
from pathlib import Path
from setuptools import setup, find_packages
from pybind11.setup_helpers import Pybind11Extension, build_ext

os.chdir(Path(__file__).parent)
cp = ConfigParser(interpolation=None)
cp.read('settings.ini', encoding='utf-8')
cfg = cp['DEFAULT']

# One portable binary: each ISA's code is selected by target attributes and run-time dispatch, never by flags here.
flags = ['/O2'] if sys.platform == 'win32' else ['-O3', '-fvisibility=hidden', '-ffp-contract=off']
kernels = Pybind11Extension('fastsparse._kernels', sorted(glob('kernels/*.cpp')), cxx_std=17, extra_compile_args=flags,
                            depends=sorted(glob('kernels/*.h') + glob('kernels/*.inc')),
                            optional=os.environ.get('FASTSPARSE_REQUIRE_KERNELS') != '1')

class BuildKernels(build_ext):
    "A build that fails leaves no older kernels for newer Python to call."
    def build_extension(self, ext):
        try: super().build_extension(ext)
        except Exception:
            for built in (Path(self.get_ext_fullpath(ext.name)), *Path('fastsparse').glob('_kernels.*')): built.unlink(missing_ok=True)
            raise

for old in Path('build').glob('lib*/fastsparse/*.py'):      # setuptools would install modules that are gone
    if not Path('fastsparse', old.name).exists(): old.unlink()

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      license='Apache-2.0', keywords=cfg['keywords'].split(), python_requires='>=' + cfg['min_python'],
      long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      packages=find_packages(include=['fastsparse', 'fastsparse.*']), ext_modules=[kernels], cmdclass=dict(build_ext=BuildKernels), zip_safe=False,
      install_requires=cfg['requirements'].split(),
      extras_require=dict(demo=cfg['demo_requirements'].split(), dev=cfg['dev_requirements'].split() + cfg['demo_requirements'].split()),
      entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=['fastsparse = fastsparse._modidx:d']))

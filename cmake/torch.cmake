# libtorch as PyPI's wheel has it: of .venv, where scripts/deps.sh python puts it, or of the environment for which pip
# builds. -D HEED_TORCH=OFF builds without, -D HEED_TORCH=/path/to/site-packages/torch takes another.
#
#   heed_torch          static: heed's operators on torch tensors, for C++
#   heed_torch_objects  what it is made of
set(HEED_TORCH AUTO CACHE STRING "The folder of torch in some site-packages, AUTO or OFF")
if(HEED_TORCH STREQUAL "AUTO")
  if(SKBUILD)  # pip's build: its Python belongs to the environment that the package is for
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
      OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
    set(torch_folders ${site_packages}/torch)
  else()
    file(GLOB torch_folders ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
  endif()
elseif(HEED_TORCH)
  set(torch_folders ${HEED_TORCH})
endif()

set(Torch_FOUND FALSE)
if(torch_folders AND NOT (HEED_SANITIZE OR HEED_FUZZ))
  # Its checks for what heed does not use (CUDA, kineto) are of no interest.
  set(CMAKE_MESSAGE_LOG_LEVEL_BEFORE ${CMAKE_MESSAGE_LOG_LEVEL})
  set(CMAKE_MESSAGE_LOG_LEVEL ERROR)
  find_package(Torch CONFIG QUIET PATHS ${torch_folders}/share/cmake/Torch NO_DEFAULT_PATH)
  set(CMAKE_MESSAGE_LOG_LEVEL ${CMAKE_MESSAGE_LOG_LEVEL_BEFORE})
endif()
if(NOT Torch_FOUND)
  message(STATUS "heed: no torch, so without torch operators and their tests (scripts/deps.sh python installs it)")
  return()
endif()
message(STATUS "heed: torch operators, torch ${Torch_VERSION} from ${torch_folders}")

# torch's folder of headers holds an fmt of its own, which comes before the system's: it is used from its headers alone.
add_library(heed_torch_objects OBJECT heed/torch/attend.cpp heed/torch/tensors.cpp)
target_compile_definitions(heed_torch_objects PUBLIC FMT_HEADER_ONLY)
target_link_libraries(heed_torch_objects PUBLIC torch PRIVATE heed heed_options)
add_library(heed_torch STATIC $<TARGET_OBJECTS:heed_torch_objects>)
target_compile_definitions(heed_torch INTERFACE FMT_HEADER_ONLY)
target_link_libraries(heed_torch PUBLIC heed torch)
